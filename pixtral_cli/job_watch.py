"""What `pixtral run --watch` is asked: folders whose pictures come while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.job_files import Asked, read_questions

if TYPE_CHECKING:
    from pixtral_runtime.batch.sidecars import SidecarSettings


def read_watched(
    folders: list[str],
    prompts: list[str],
    system: str | None,
    max_new_tokens: int,
    recursive: bool,
    limit: int | None,
    captions: SidecarSettings | None,
    results: Path | None,
    report: Path | None,
    copies: str | None,
) -> Asked:
    """The questions about pictures as they come; `copies` is an option that wants them again. Raises InputError."""
    from pixtral_runtime.batch.watched_requests import WatchedRequests
    from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES
    from pixtral_runtime.sources.watch import Watch

    if not folders:
        raise InputError("--watch needs folders", "pixtral run BUNDLE photos/ --watch -o results.jsonl")
    if results is None:
        raise InputError("--watch needs an output file, which knows what was asked already", "-o results.jsonl")
    for path in filter(None, (results, report)):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"{path} would be taken for a picture", f"-o {path.with_suffix('.jsonl')}")
    if copies is not None:
        raise InputError(
            f"{copies} copies pictures at the end, which may have gone by then",
            "--watch without it, and then the same command with --resume and without --watch",
        )
    watch = Watch([Path(folder) for folder in folders], recursive=recursive, note=output.talk)
    sidecars = None if captions is None else WatchedSidecars(captions, watch)
    asked = WatchedRequests(watch, read_questions(prompts), system, max_new_tokens, sidecars, limit)
    return Asked(asked, (), sidecars)
