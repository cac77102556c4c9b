"""What `pixtral run --watch` is asked: folders whose pictures and documents come while it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.job_files import Asked, read_questions

if TYPE_CHECKING:
    from pixtral_runtime.batch.sidecars import SidecarSettings
    from pixtral_runtime.sources.open import SourceSettings


def read_watched(
    folders: list[str],
    prompts: list[str],
    system: str | None,
    max_new_tokens: int,
    sources: SourceSettings,
    limit: int | None,
    captions: SidecarSettings | None,
    results: Path | None,
    report: Path | None,
    table: str | None,
    copies: str | None,
) -> Asked:
    """The questions about what comes; `copies` is an option that wants pictures again. Raises InputError."""
    from pixtral_runtime.batch import imagefolder
    from pixtral_runtime.batch.prompt_template import PromptTemplate
    from pixtral_runtime.batch.watched_requests import WatchedRequests
    from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.sources.documents import watched_suffixes
    from pixtral_runtime.sources.watch import Watch

    if not folders:
        raise InputError("--watch needs folders", "pixtral run BUNDLE photos/ --watch -o results.jsonl")
    if results is None:
        raise InputError("--watch needs an output file, which knows what was asked already", "-o results.jsonl")
    wanted = watched_suffixes(with_videos=sources.with_videos)
    for path in filter(None, (results, report)):
        if path.suffix.lower() in wanted:
            raise InputError(f"{path} would be taken for a picture", f"-o {path.with_suffix('.jsonl')}")
    if copies is not None:
        raise InputError(
            f"{copies} copies pictures at the end, which may have gone by then",
            "--watch without it, and then the same command with --resume and without --watch",
        )
    watch = Watch([Path(folder) for folder in folders], wanted, recursive=sources.recursive, note=output.talk)
    sidecars = None if captions is None else WatchedSidecars(captions, watch)
    questions = read_questions(prompts)
    documents = replace(sources.documents, wants_text=any(PromptTemplate(text).has_text for text in questions))
    no_file = imagefolder.no_file if table == "imagefolder" else None
    asked = WatchedRequests(watch, questions, documents, system, max_new_tokens, sidecars, no_file, limit)
    return Asked(asked, (), sidecars, has_documents=sidecars is None and no_file is None)
