"""What calibration reads: prompts of the user's, or the packaged ones.

The packaged ones are texts of many kinds and pictures in turn. A folder gives images, asked the packaged questions in
turn. A JSON Lines file gives an object a line: `prompt`, and `image` (a path, relative to the file) or `images`
(several) or neither. Images are scaled to `MOST_IMAGE_TOKENS`: what activations look like hardly depends on resolution,
and twice as many tokens take twice as long.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from pixtral_runtime.errors import ImageError, InputError, Option
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import collect_images, open_image
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder
from pixtral_runtime.inputs.text_file import parsed_json, read_lines

DEFAULT_SAMPLES = 32
MOST_IMAGE_TOKENS = 256
PACKAGED = Path(__file__).parent / "samples"
TEXTS = PACKAGED / "texts.txt"
TEXTS_END = "====\n"
PICTURE_PLACES = (0, 2, 1, 3, 3, 1, 2, 0)  # of four: no regular choice of a few has pictures or texts alone
PACKAGED_QUESTIONS = (
    "Describe this image in one short sentence.",
    "Describe this image in detail.",
    "What text can be read in this image? Write it down word for word.",
    "List every object in this image with its color and position.",
    "What is unusual about this image? Explain step by step.",
)


@dataclass(frozen=True)
class CalibrationRequest:
    """One sample before it is tokenized."""

    prompt: str
    images: tuple[Path, ...] = ()


def packaged_requests() -> list[CalibrationRequest]:
    """Three texts and a picture, eight times."""
    texts = [CalibrationRequest(text.strip()) for text in TEXTS.read_text(encoding="utf-8").split(TEXTS_END)]
    mixed: list[CalibrationRequest] = []
    for n, (place, picture) in enumerate(zip(PICTURE_PLACES, packaged_pictures(), strict=True)):
        three = texts[3 * n : 3 * n + 3]
        mixed += [*three[:place], picture, *three[place:]]
    return mixed


def packaged_pictures() -> list[CalibrationRequest]:
    """The packaged pictures, each with a question of its own."""
    return _asked(sorted(path for path in PACKAGED.iterdir() if path.suffix in (".jpg", ".png")))


def calibration_requests(source: Path) -> list[CalibrationRequest]:
    """The samples of a folder or a JSON Lines file. Raises InputError."""
    if os.path.isdir(source):
        return _asked(collect_images([str(source)], (), recursive=True))
    lines = read_lines(source, Option("calibration", ("FOLDER", "FILE.jsonl")))
    return [_request(source, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _asked(images: Iterable[Path]) -> list[CalibrationRequest]:
    """A packaged question about each image, in turn."""
    return [
        CalibrationRequest(question, (image,))
        for question, image in zip(cycle(PACKAGED_QUESTIONS), images, strict=False)
    ]


def _request(source: Path, number: int, line: str) -> CalibrationRequest:
    try:
        entry = parsed_json(line)
        images = entry.get("images", [entry["image"]] if "image" in entry else [])
        if not isinstance(entry["prompt"], str) or not all(isinstance(image, str) for image in images):
            raise TypeError("prompt and image must be text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{source}, line {number}: {error}; expected an object with 'prompt' and perhaps 'image'",
            '{"image": "photo.jpg", "prompt": "What is shown?"}',
        ) from error
    return CalibrationRequest(entry["prompt"], tuple(source.parent / image for image in images))


def build_samples(
    requests: Sequence[CalibrationRequest], prompts: PromptBuilder, count: int
) -> tuple[list[Prompt], list[str]]:
    """Tokenize `count` requests spread evenly over all. Returns them, and why others in their place were left out.

    Raises InputError where nothing is left.
    """
    built: list[Prompt] = []
    refused: list[str] = []
    for request in _spread(requests, count):
        if len(built) == count:
            break
        try:
            pictures = [open_image(path) for path in request.images]
        except ImageError as error:
            refused.append(str(error))
            continue
        built.append(prompts.build(user_message(request.prompt, pictures)))
    if not built:
        reason = f"; {refused[0]}" if refused else ""
        raise InputError(
            f"none of the {len(requests)} calibration samples can be read{reason}",
            Option("calibration", "FOLDER", "with images like those the model will see"),
        )
    return built, refused


def _spread(requests: Sequence[CalibrationRequest], count: int) -> Iterator[CalibrationRequest]:
    """First `count` requests at even distances, then the others, to stand in for broken ones."""
    chosen = [n * len(requests) // count for n in range(count)] if len(requests) > count else range(len(requests))
    yield from (requests[n] for n in chosen)
    taken = set(chosen)
    yield from (request for n, request in enumerate(requests) if n not in taken)


def samples_fingerprint(samples: Iterable[Prompt]) -> str:
    """One hash for tokens and pixels, 16 hex digits."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.token_ids.tobytes())
        for image in sample.images:
            digest.update(image.tobytes())
    return digest.hexdigest()[:16]
