"""One prompt over many images: a record an image, and an error never stops the rest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError
from pixtral_runtime.image import decode_image, stored_size
from pixtral_runtime.model import Model, read_image_file
from pixtral_runtime.preprocess import token_count
from pixtral_runtime.prompt import PromptBuilder, user_message
from pixtral_runtime.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """What is asked of each image."""

    prompt: str
    system: str | None = None
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    apply_exif: bool = True


@dataclass
class Record:
    """What became of one image: an answer, or an error with its hint. Sizes in pixels, times in milliseconds."""

    path: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    image_tokens: int | None = None
    prompt_tokens: int | None = None
    answer: str | None = None
    new_tokens: int | None = None
    finish_reason: str | None = None
    times_ms: dict[str, float] = field(default_factory=dict)
    preprocess: str | None = None
    exif_applied: bool | None = None
    bundle: str | None = None
    error: str | None = None
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_fit(prompts: PromptBuilder, paths: Sequence[Path], job: Job) -> None:
    """Refuse a job that cannot be done, before any work: raises InputError.

    The prompt must fit the context alone and with each image. Image headers are read only where the largest possible
    image would not fit; what cannot be read is left for the run to record.
    """
    text_tokens = len(prompts.build(user_message(job.prompt, system=job.system)).token_ids)
    room = prompts.bundle.limits.max_context - text_tokens - 1
    if prompts.preprocess.largest_block <= room:
        return
    for path in paths:
        size = stored_size(path)
        tokens = 0 if size is None else token_count(*prompts.preprocess.grid(*size))
        if tokens > room:
            raise InputError(
                f"{path} takes {tokens} tokens, the prompt {text_tokens}, and the bundle's context holds "
                f"{prompts.bundle.limits.max_context}",
                f"--image-tokens {room} for smaller images, or pixtral export … --max-context N",
            )


def run_job(model: Model, paths: Sequence[Path], job: Job) -> Iterator[Record]:
    """Answer the job's prompt for each image, in order. Broken images give records with `error` set."""
    for path in paths:
        record = Record(
            str(path),
            preprocess=model.prompts.preprocess.mode,
            exif_applied=job.apply_exif,
            bundle=model.bundle.fingerprint,
        )
        try:
            _answer(model, path, job, record)
        except InputError as error:
            record.error, record.hint = str(error), error.hint
        yield record


def _answer(model: Model, path: Path, job: Job, record: Record) -> None:
    clock = time.perf_counter()

    def lap() -> float:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        return round((clock - before) * 1e3, 3)

    data = read_image_file(path)
    record.sha256 = hashlib.sha256(data).hexdigest()
    picture = decode_image(data, str(path), apply_exif=job.apply_exif).pixels
    record.width, record.height = picture.size
    record.times_ms["image"] = lap()
    prompt = model.prompts.build(user_message(job.prompt, [picture], job.system))
    record.image_tokens, record.prompt_tokens = prompt.image_tokens, len(prompt.token_ids)
    record.times_ms["preprocess"] = lap()
    answer = model.answer(prompt, job.max_new_tokens, job.sampling)
    times = answer.times
    record.times_ms |= {
        "vision": round(times.vision_ms, 3),
        "prefill": round(times.prefill_ms, 3),
        "decode": round(times.decode_ms, 3),
    }
    record.answer, record.finish_reason = answer.text, answer.finish_reason
    record.new_tokens = len(answer.token_ids)
