"""Does a bundle of Pixtral-12B say what Pixtral-12B is known to say?

`golden.json` holds answers that another implementation gave with the published weights: token ids, text, and the five
likeliest tokens of every position. A bundle reads the same pictures and the known answer (teacher forcing), and its
log-probabilities are held beside those: pictures, tokens, towers, decoder and head are right, or numbers differ. The
pictures are not ours to ship; whoever checks downloads them.

Source: specification section 6.2.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.forced import forced_pass
from pixtral_runtime.errors import BundleError, ImageError, InputError, Option
from pixtral_runtime.generation.logits import log_softmax
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES, open_image, read_image_file
from pixtral_runtime.json_data import from_json

NOT_COMPARED = ("decoder.max_position",)  # checkpoints of one model say different lengths
LIKELY_NATS = -6.0  # what is less likely than 1 in 400 is shown, not judged: its logit decides nothing


@dataclass(frozen=True)
class Tolerance:
    """How far log-probabilities may lie from the golden's, in nats, and what counts as a tie of its two best tokens."""

    mean_nats: float
    largest_nats: float
    tie_nats: float


TOLERANCES = {
    # The golden's logits are bfloat16, 0.125 apart: 0.06 of rounding each, and about as much noise from 40 layers. Two
    # logits one step apart may be equal.
    "float": Tolerance(0.15, 0.45, 0.2),
    "8 bit": Tolerance(0.25, 1.0, 0.5),  # weights and activations; seen 0.14 and 0.83 on the demo checkpoint
    "4 bit": Tolerance(0.5, 2.5, 1.0),  # finds broken bundles, says nothing of answers; seen 0.22 and 1.76
}
"""By the coarsest numbers that a bundle holds. Estimates: no bundle of the real weights has been measured yet."""


@dataclass(frozen=True)
class GoldenPicture:
    """A picture by name, address and size in pixels. `sha256` is of a file that was downloaded once, where known."""

    name: str
    url: str
    width: int
    height: int
    sha256: str = ""

    def download(self, folder: Path) -> str:
        return f"curl -L {self.url} > {shlex.quote(str(folder / self.name))}"


@dataclass(frozen=True)
class GoldenRequest:
    """What was asked about some pictures, and answered. The tokens of a position are ordered, likeliest first."""

    pictures: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int  # breaks and ends included
    text: str
    token_ids: tuple[int, ...]  # (n,)
    top_ids: tuple[tuple[int, ...], ...]  # (n, 5)
    top_logprobs: tuple[tuple[float, ...], ...]  # (n, 5), nats

    @property
    def name(self) -> str:
        return f"{len(self.pictures)} picture{'s' * (len(self.pictures) != 1)}"


@dataclass(frozen=True)
class Golden:
    """Known answers of one model, greedy. The text comes before the pictures in every request."""

    source: str
    model: ModelConfig
    prompt: str
    pictures: tuple[GoldenPicture, ...]
    requests: tuple[GoldenRequest, ...]

    def missing(self, request: GoldenRequest, found: Mapping[int, FoundPicture]) -> list[GoldenPicture]:
        return [self.pictures[index] for index in request.pictures if index not in found]


@dataclass(frozen=True)
class FoundPicture:
    path: Path
    is_known: bool | None  # whether the bytes are those of the known file; None where none is known


@dataclass(frozen=True)
class PositionCheck:
    """One token of the known answer. `error_nats` is the largest of its position among what is judged."""

    token: str
    golden_logprob: float | None  # None where it is not among the likeliest
    logprob: float
    error_nats: float
    choice: str  # the bundle's own
    is_same_choice: bool
    golden_gap_nats: float  # between the golden's two likeliest


@dataclass(frozen=True)
class GoldenCheck:
    """One request of the golden, and what the bundle makes of it. It passed where there are no `faults`."""

    request: str
    prompt_tokens: int
    image_tokens: int
    positions: tuple[PositionCheck, ...]
    mean_nats: float
    largest_nats: float
    golden_text: str
    text: str
    tolerance: Tolerance
    faults: tuple[str, ...]


def packaged_golden() -> Golden:
    """The answers that come with this package."""
    return from_json(Golden, json.loads(files("pixtral_runtime").joinpath("compare/golden.json").read_bytes()))


def tolerance_of(bundle: Bundle) -> Tolerance:
    if bundle.precision in ("int4", "nvfp4"):
        return TOLERANCES["4 bit"]
    is_plain = bundle.precision == bundle.dtype and bundle.kv_cache is None
    return TOLERANCES["float" if is_plain else "8 bit"]


def refuse_other_models(bundle: Bundle, golden: Golden) -> None:
    """Raise BundleError where the bundle's configuration is not that of the golden's model."""
    found = bundle.model.differences(golden.model)
    if different := [f"{name} is {a}, not {b}" for name, (a, b) in found.items() if name not in NOT_COMPARED]:
        raise BundleError(
            f"{bundle.path} is not of the model whose answers are known: {', '.join(different[:3])}",
            "pixtral export mistralai/Pixtral-12B-2409 -o pixtral-12b",
            Option("against", "CHECKPOINT", "for other models"),
        )


def find_pictures(folder: Path, golden: Golden) -> dict[int, FoundPicture]:
    """The golden's pictures in a folder, by place. Their bytes tell them, or else number in the name and size.

    Raises InputError where no request has all of its own.
    """
    listed = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in listed if path.suffix.lower() in IMAGE_SUFFIXES]
    hashes = {path: _hash(path) for path in paths}
    found: dict[int, FoundPicture] = {}
    for index, picture in enumerate(golden.pictures):
        same = [path for path in paths if picture.sha256 and hashes[path] == picture.sha256]
        alike = [path for path in paths if _is_named(path, picture) and _size(path) == (picture.width, picture.height)]
        if same or alike:
            is_known = bool(same) if picture.sha256 else None
            found[index] = FoundPicture((same or alike)[0], is_known)
    if all(golden.missing(request, found) for request in golden.requests):
        needed = [picture.download(folder) for picture in golden.missing(golden.requests[0], found)]
        first = () if folder.is_dir() else (f"mkdir {shlex.quote(str(folder))}",)
        raise InputError(f"{folder} has none of the pictures whose answers are known", *first, *needed)
    return found


def _hash(path: Path) -> str:
    try:
        return sha256(read_image_file(path)).hexdigest()
    except ImageError:
        return ""


def _is_named(path: Path, picture: GoldenPicture) -> bool:
    """Whether a name holds the number that the picture's begins with, as in 237-400x300.jpg or photo_237.jpg."""
    number = picture.name.partition("-")[0]
    return re.search(rf"(?<![0-9]){re.escape(number)}(?![0-9])", path.stem) is not None


def _size(path: Path) -> tuple[int, int] | None:
    try:
        return open_image(path, apply_exif=False).size
    except ImageError:
        return None


def check_request(
    model: Model, golden: Golden, request: GoldenRequest, found: Mapping[int, FoundPicture]
) -> GoldenCheck:
    """Ask the bundle what the golden was asked. Raises ContextError where it does not fit."""
    pictures = [open_image(found[index].path, apply_exif=False) for index in request.pictures]
    prompt = model.prompts.build([Message("user", (golden.prompt, *pictures))], len(request.token_ids))
    _, logits, _ = forced_pass(model, prompt, request.token_ids)
    positions, errors = [], []
    for place, row in enumerate(logits):
        logprobs = log_softmax(row)
        ids, expected = request.top_ids[place], request.top_logprobs[place]
        judged = [abs(float(logprobs[i]) - e) for i, e in zip(ids, expected, strict=True) if e >= LIKELY_NATS]
        token, choice = request.token_ids[place], int(row.argmax())
        positions.append(
            PositionCheck(
                token=_shown(model, token),
                golden_logprob=dict(zip(ids, expected, strict=True)).get(token),
                logprob=float(logprobs[token]),
                error_nats=max(judged, default=0.0),
                choice=_shown(model, choice),
                is_same_choice=choice == token,
                golden_gap_nats=expected[0] - expected[1],
            )
        )
        errors += judged
    answer = model.answer(prompt, len(request.token_ids))
    tolerance = tolerance_of(model.bundle)
    mean, largest = statistics.fmean(errors), max(errors)
    faults = []
    for what, seen, wanted in (
        ("tokens in the prompt", len(prompt.token_ids), request.prompt_tokens),
        ("tokens of pictures", prompt.image_tokens, request.image_tokens),
    ):
        if seen != wanted:
            faults.append(f"{seen} {what}, {wanted} are known")
    if not mean <= tolerance.mean_nats:
        faults.append(f"log-probabilities differ by {mean:.2f} nats on average, {tolerance.mean_nats} is allowed")
    if not largest <= tolerance.largest_nats:
        where = max(range(len(positions)), key=lambda place: positions[place].error_nats)
        faults.append(f"token {where} differs by {largest:.2f} nats, {tolerance.largest_nats} is allowed")
    for place, position in enumerate(positions):
        if not position.is_same_choice and position.golden_gap_nats >= tolerance.tie_nats:
            faults.append(
                f"token {place} is {position.choice!r} instead of {position.token!r}, which leads by "
                f"{position.golden_gap_nats:.2f} nats; {tolerance.tie_nats} is no tie"
            )
    return GoldenCheck(
        request.name, len(prompt.token_ids), prompt.image_tokens, tuple(positions), mean, largest,
        request.text, answer.text, tolerance, tuple(faults),
    )  # fmt: skip


def _shown(model: Model, token: int) -> str:
    return model.prompts.detokenize([token]) or f"<{token}>"
