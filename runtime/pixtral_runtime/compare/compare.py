"""How much a second bundle of a model, usually a quantized one, differs from the first on given images and prompts.

In: two bundles of one model, the first being the reference, and cases: a prompt with one image or none. Out: a
`BundleComparison`.

The measure is the logits. The reference answers greedily; then each bundle reads that same answer token by token
(teacher forcing), and the two predictions of every token are compared. Free-running answers are compared as well, but
prove less: where two tokens are nearly tied the smallest change flips one, and all that follows (specification 6.1).
Of texts that are handed in both bundles predict each token, and answer nothing.
Where a difference comes from is seen in what both passes leave behind: image features, keys and values of each layer.

Two bundles of 12B do not fit in memory together, so the reference runs over all cases first and what is compared later
waits in a temporary folder. It is removed at the end, after errors as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import Array, KVCache
from pixtral_runtime.bundle.manifest import Bundle, Limits
from pixtral_runtime.compare.divergence import Noise, first_difference, kl_nats, top2_gap_nats, word_similarity
from pixtral_runtime.compare.forced import forced_pass
from pixtral_runtime.compare.result import (
    NEAR_TIE_NATS,
    AnswersDifference,
    BundleComparison,
    CaseDifference,
    LayerDifference,
    LogitsDifference,
    Side,
    Skipped,
    WorstLayer,
)
from pixtral_runtime.compare.texts import TEXT_WINDOW, check_disk, windows_to_read
from pixtral_runtime.errors import BundleError, HintWriter, ImageError, InputError, python_hint
from pixtral_runtime.generation.model import Answer, Model, load_bundle
from pixtral_runtime.generation.text_reading import logits_by_chunk
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import open_image
from pixtral_runtime.inputs.preprocess import Preprocess, default_preprocess
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder
from pixtral_runtime.inputs.text_file import read_lines
from pixtral_runtime.inputs.text_windows import BadText, Text

SHOWN_TEXT = 200  # characters of a piece of text
DEFAULT_PROMPT = "Describe this image in one short sentence."
COMPARED_ROWS = (
    512  # rows of keys and values compared a case, evenly spaced: all rows of 3,000 tokens at 12B are 490 MB
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompareSettings:
    """What both bundles are run with. None for an image setting takes what the bundles allow."""

    max_new_tokens: int = 32
    apply_exif: bool = True
    max_image_side: int | None = None
    image_tokens: int | None = None
    threads: int = 0
    most_windows: int | None = None  # of texts that are read
    write_hint: HintWriter = python_hint  # of what is skipped


@dataclass(frozen=True)
class _Case:
    """A case the reference has answered, or a text that it has read. `file` holds the prompt and what the pass left."""

    image: str | None
    text: str
    answer: Answer | None
    file: Path
    source: str | None = None  # of a text


@dataclass(frozen=True)
class _Pass:
    """What a bundle makes of prompt and forced answer."""

    features: Array  # (F, D)
    logits: npt.NDArray[np.float32]  # (n, V), the prediction of each token of the answer or the text
    layers: list[tuple[Array, Array]]  # key and value, (K, rows, E) each


@dataclass
class _Totals:
    """What adds up over the cases."""

    kl_nats: list[float] = field(default_factory=list)
    gaps_nats: list[float] = field(default_factory=list)  # the reference's, at disagreements
    features: Noise = field(default_factory=Noise)
    layers: list[tuple[Noise, Noise]] = field(default_factory=list)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # do not count. Raises InputError."""
    lines = [line.strip() for line in read_lines(path, "a text file in UTF-8")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"the prompt file {path} holds no prompt", f"echo 'What is shown?' > {path}")
    return prompts


def compare_bundles(
    reference: Bundle,
    candidate: Bundle,
    images: Sequence[Path],
    texts: Sequence[str],
    settings: CompareSettings,
    progress: Progress,
    read: Sequence[Text | BadText] = (),
) -> BundleComparison:
    """Compare on each image with each text, or on the texts alone where there is no image; and on what is only `read`.

    Raises InputError where the bundles are not of one model or no case can be used, MachineError where one of them
    cannot run here or the disk does not hold what is compared later.
    """
    check_comparable(reference, candidate)
    limits = Limits(
        min(reference.limits.max_context, candidate.limits.max_context),
        min(reference.limits.max_image_side, candidate.limits.max_image_side),
    )
    reference, candidate = replace(reference, limits=limits), replace(candidate, limits=limits)
    preprocess = default_preprocess(reference, max_side=settings.max_image_side, image_tokens=settings.image_tokens)
    _, candidate_load_s = _load(candidate, preprocess, settings.threads)  # what cannot run is found before the work
    model, reference_load_s = _load(reference, preprocess, settings.threads)
    with TemporaryDirectory(prefix="pixtral-compare-") as folder:
        cases, skipped = _record(model, images, texts, read, settings, Path(folder), progress)
        del model  # its memory is needed for the candidate
        model, _ = _load(candidate, preprocess, settings.threads)
        totals = _Totals(layers=[(Noise(), Noise()) for _ in range(candidate.model.decoder.n_layers)])
        answers: list[Answer] = []
        differences: list[CaseDifference] = []
        for case in cases:
            progress("candidate", len(differences), len(cases))
            difference, answer = _compare_case(model, case, settings, totals)
            differences.append(difference)
            answers += [] if answer is None else [answer]
        progress("candidate", len(cases), len(cases))
    layers = tuple(LayerDifference(n, key.snr_db, value.snr_db) for n, (key, value) in enumerate(totals.layers))
    return BundleComparison(
        logits=_summarize(totals),
        image_features_db=totals.features.snr_db,
        images=sum(case.image is not None for case in cases),
        layers=layers,
        worst_layer=_worst(layers),
        answers=_answers(differences),
        reference=_side(reference, reference_load_s, [case.answer for case in cases if case.answer is not None]),
        candidate=_side(candidate, candidate_load_s, answers),
        settings={
            "max_new_tokens": settings.max_new_tokens,
            "preprocess": preprocess.mode,
            "max_image_side": preprocess.max_side,
            "image_tokens": preprocess.image_tokens,
            "exif_applied": settings.apply_exif,
            "threads": settings.threads,
            "near_tie_nats": NEAR_TIE_NATS,
            "cache_rows_per_case": COMPARED_ROWS,
            "window": TEXT_WINDOW if read else None,
        },
        cases=tuple(differences),
        skipped=tuple(skipped),
    )


def check_comparable(reference: Bundle, candidate: Bundle) -> None:
    """Raises BundleError unless both bundles have one model's sizes and one tokenizer."""
    hint = f"pixtral inspect {candidate.path}; both must be exports of one checkpoint"
    for name, (ours, theirs) in reference.model.differences(candidate.model).items():
        raise BundleError(
            f"{reference.path} and {candidate.path} are different models: {name} is {ours} and {theirs}", hint
        )
    if len({one.files[one.tokenizer_name].sha256 for one in (reference, candidate)}) > 1:
        raise BundleError(f"{reference.path} and {candidate.path} have different tokenizers", hint)


def _load(bundle: Bundle, preprocess: Preprocess, threads: int) -> tuple[Model, float]:
    started = time.perf_counter()
    model = load_bundle(bundle, PromptBuilder(bundle, preprocess), threads=threads, backend="ort-cpu")
    return model, time.perf_counter() - started


def _record(
    model: Model,
    images: Sequence[Path],
    texts: Sequence[str],
    read: Sequence[Text | BadText],
    settings: CompareSettings,
    folder: Path,
    progress: Progress,
) -> tuple[list[_Case], list[Skipped]]:
    """Run the reference over all cases. Raises InputError where none can be used."""
    cases: list[_Case] = []
    windows, skipped = windows_to_read(model, read, settings.most_windows)
    check_disk(model, folder, sum(len(window.token_ids) for window in windows))
    asked = max(1, len(images)) * len(texts)
    total = asked + len(windows)
    progress("reference", 0, total)
    for done, request in enumerate(_requests(model.prompts, images, texts, settings), start=1):
        if isinstance(request, Skipped):
            skipped.append(request)
        else:
            image, text, prompt = request
            answer = model.answer(prompt, settings.max_new_tokens)
            file = folder / f"{len(cases)}.npz"
            _save(file, prompt, _forced_pass(model, prompt, answer.token_ids))
            cases.append(_Case(image, text, answer, file))
        progress("reference", done, total)
    for done, window in enumerate(windows, start=asked + 1):
        shown = model.prompts.detokenize(window.token_ids)[:SHOWN_TEXT]
        file = folder / f"{len(cases)}.npz"
        prompt = model.prompts.plain(window.token_ids[:-1])  # the last one is predicted and not read
        _save(file, prompt, _reading_pass(model, prompt))
        cases.append(_Case(None, shown, None, file, window.name))
        progress("reference", done, total)
    if not cases:
        first = skipped[0]
        raise InputError(f"nothing is left to compare on; the first of {len(skipped)}: {first.reason}", first.hint)
    return cases, skipped


def _requests(
    prompts: PromptBuilder, images: Sequence[Path], texts: Sequence[str], settings: CompareSettings
) -> Iterator[tuple[str | None, str, Prompt] | Skipped]:
    paths: Sequence[Path | None] = images or [None]
    for path in paths:
        name = None if path is None else str(path)
        try:
            pictures = [] if path is None else [open_image(path, apply_exif=settings.apply_exif)]
        except ImageError as error:
            yield Skipped(name, None, str(error), settings.write_hint(error))
            continue
        for text in texts:
            try:
                yield name, text, prompts.build(user_message(text, pictures))
            except InputError as error:
                yield Skipped(name, text, str(error), settings.write_hint(error))


def _forced_pass(model: Model, prompt: Prompt, tokens: Sequence[int]) -> _Pass:
    features, logits, cache = forced_pass(model, prompt, tokens)
    filled = len(prompt.token_ids) + len(tokens) - 1
    return _Pass(features, logits, _rows(model.bundle, cache, _kept(filled)))


def _reading_pass(model: Model, prompt: Prompt) -> _Pass:
    """As `_forced_pass`, for a text: what is predicted after each of its tokens."""
    filled = len(prompt.token_ids)
    cache = model.runner.sessions.decoder.new_cache(slots=1, rows=filled)
    logits = np.concatenate([rows for _, rows in logits_by_chunk(model, prompt, cache)])
    return _Pass(model.runner.no_features[:0], logits, _rows(model.bundle, cache, _kept(filled)))


def _kept(filled: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, filled - 1, min(filled, COMPARED_ROWS)).round().astype(np.int64))


def _rows(bundle: Bundle, cache: KVCache, kept: Array) -> list[tuple[Array, Array]]:
    """Keys and values of slot 0 at some rows, (K, rows, E) each, as numbers where the cache holds codes."""
    tensors = [tensor[0][:, kept] for layer in cache.layers() for tensor in layer]
    if bundle.kv_cache is not None:
        scales: list[float] = bundle.quantization["cache_scales"]
        tensors = [codes * np.float32(scale) for codes, scale in zip(tensors, scales, strict=True)]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _save(file: Path, prompt: Prompt, run: _Pass) -> None:
    arrays = {"ids": prompt.token_ids, "index": prompt.feature_index, "features": run.features, "logits": run.logits}
    arrays |= {f"image_{n}": image for n, image in enumerate(prompt.images)}
    for layer, (key, value) in enumerate(run.layers):
        arrays |= {f"key_{layer}": key, f"value_{layer}": value}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for the flag allow_pickle


def _compare_case(
    model: Model, case: _Case, settings: CompareSettings, totals: _Totals
) -> tuple[CaseDifference, Answer | None]:
    """Run the candidate over a case, add to the totals, and forget the reference's arrays."""
    before = case.answer
    with np.load(case.file) as stored:
        images = tuple(stored[name] for name in stored.files if name.startswith("image_"))
        prompt = Prompt(stored["ids"], stored["index"], images, 0 if before is None else before.image_tokens)
        run = _reading_pass(model, prompt) if before is None else _forced_pass(model, prompt, before.token_ids)
        if images:
            totals.features.add(stored["features"], run.features)
        for layer, (key, value) in enumerate(run.layers):
            totals.layers[layer][0].add(stored[f"key_{layer}"], key)
            totals.layers[layer][1].add(stored[f"value_{layer}"], value)
        expected = stored["logits"]  # (n, V)
    case.file.unlink()
    answer = None if before is None else model.answer(prompt, settings.max_new_tokens)
    kl = [kl_nats(*rows) for rows in zip(expected, run.logits, strict=True)]
    differing = np.flatnonzero(expected.argmax(1) != run.logits.argmax(1))
    totals.kl_nats += kl
    totals.gaps_nats += [top2_gap_nats(expected[position]) for position in differing]
    difference = CaseDifference(
        image=case.image,
        prompt=case.text,
        prompt_tokens=len(prompt.token_ids),
        positions=len(kl),
        kl_mean_nats=statistics.fmean(kl),
        kl_max_nats=max(kl),
        top1_agreement=1 - len(differing) / len(kl),
        first_diverging_token=int(differing[0]) if len(differing) else None,
        reference_answer=None if before is None else before.text,
        answer=None if answer is None else answer.text,
        similarity=None if before is None or answer is None else word_similarity(before.text, answer.text),
        first_different_token=(
            None if before is None or answer is None else first_difference(before.token_ids, answer.token_ids)
        ),
        text=case.source,
    )
    return difference, answer


def _answers(differences: Sequence[CaseDifference]) -> AnswersDifference | None:
    similar = [difference.similarity for difference in differences if difference.similarity is not None]
    if not similar:
        return None
    same = [each.answer == each.reference_answer for each in differences if each.similarity is not None]
    return AnswersDifference(exact_match=statistics.fmean(same), similarity_mean=statistics.fmean(similar))


def _summarize(totals: _Totals) -> LogitsDifference:
    kl = np.array(totals.kl_nats)
    return LogitsDifference(
        positions=len(kl),
        kl_mean_nats=float(kl.mean()),
        kl_median_nats=float(np.median(kl)),
        kl_p95_nats=float(np.percentile(kl, 95)),
        kl_max_nats=float(kl.max()),
        top1_agreement=1 - len(totals.gaps_nats) / len(kl),
        disagreements=len(totals.gaps_nats),
        near_ties=sum(gap < NEAR_TIE_NATS for gap in totals.gaps_nats),
    )


def _worst(layers: Sequence[LayerDifference]) -> WorstLayer | None:
    found = [
        WorstLayer(layer.layer, tensor, snr_db)
        for layer in layers
        for tensor, snr_db in (("key", layer.key_db), ("value", layer.value_db))
        if snr_db is not None
    ]
    return min(found, key=lambda worst: worst.snr_db, default=None)


def _side(bundle: Bundle, load_s: float, answers: Sequence[Answer]) -> Side:
    prefill = [answer.prompt_tokens / answer.times.prefill_ms * 1e3 for answer in answers]
    decode = [a.times.decode_steps / a.times.decode_ms * 1e3 for a in answers if a.times.decode_steps]
    return Side(
        bundle=str(bundle.path),
        fingerprint=bundle.fingerprint,
        precision=bundle.precision,
        dtype=bundle.dtype,
        bundle_bytes=sum(entry.bytes for entry in bundle.files.values()),
        load_s=load_s,
        prefill_tokens_per_s=statistics.median(prefill) if prefill else None,
        decode_tokens_per_s=statistics.median(decode) if decode else None,
    )
