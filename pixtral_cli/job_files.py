"""What `pixtral run` is asked, from its arguments, and the files that it writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.options import STDIN, read_prompt, refuse_unused

if TYPE_CHECKING:
    import typer

    from pixtral_runtime.batch.item_requests import Requests
    from pixtral_runtime.batch.records import Request
    from pixtral_runtime.batch.run import Tally
    from pixtral_runtime.batch.sidecars import Sidecars, SidecarSettings
    from pixtral_runtime.inputs.prompt import PromptBuilder
    from pixtral_runtime.sources.open import SourceSettings

KNOWN_PLACEHOLDERS = "{name}, {directory}, {tags} and {text}"
PER = ("page", "document", "frame", "clip")
TABLE_FORMATS = ("csv", "parquet", "webdataset", "imagefolder", "openai")


@dataclass(frozen=True)
class JobFiles:
    """What `pixtral run` writes: records, and at the end a table beside them, or a data set, and a page."""

    results: Path | None
    table_format: str | None
    report: Path | None
    resume: bool
    force: bool
    formulas: bool = False
    embed: bool = False
    sidecars: Sidecars | None = None

    @property
    def table(self) -> Path | None:
        """The first file of it."""
        from pixtral_runtime.batch.webdataset import shard_path

        if self.results is None or self.table_format is None:
            return None
        if self.table_format == "imagefolder":
            return self.results.with_name("metadata.jsonl")
        if self.table_format == "webdataset":
            return shard_path(self.results)
        suffix = ".openai.jsonl" if self.table_format == "openai" else f".{self.table_format}"
        return self.results.with_suffix(suffix)

    def write_table(self, asked: Requests, tally: Tally) -> None:
        """Write the table, or the data set. Raises InputError, MachineError."""
        from pixtral_runtime.batch.asked_pictures import AnsweredRequests
        from pixtral_runtime.batch.imagefolder import check_imagefolder
        from pixtral_runtime.batch.tables import write_table
        from pixtral_runtime.batch.webdataset import write_webdataset

        if self.results is None or self.table is None or self.table_format is None:
            return
        answered = AnsweredRequests(asked, tally.records)
        if self.table_format == "webdataset":
            write_webdataset(answered, self.results)
            return
        if self.table_format == "imagefolder" and not isinstance(asked, Sequence):
            check_imagefolder(asked, self.table)  # of a stream only the first were seen
        embedded = answered if self.embed else None
        write_table(tally.in_order(), self.table, self.table_format, formulas=self.formulas, answered=embedded)

    def check(self, asked: Requests, inputs: Iterable[Path]) -> None:
        """Refuse what could not be written, before the hours that it may take. Raises InputError, MachineError."""
        from pixtral_runtime.batch.imagefolder import check_imagefolder
        from pixtral_runtime.batch.item_requests import outline
        from pixtral_runtime.batch.webdataset import shards_beside
        from pixtral_runtime.errors import InputError, Option
        from pixtral_runtime.files import Output, check_outputs

        if self.results is None and (self.resume or self.table_format):
            raise InputError(f"{'--resume' if self.resume else '--format'} needs an output file", "-o results.jsonl")
        if self.table_format not in (None, *TABLE_FORMATS):
            raise InputError(f"no table format '{self.table_format}'", f"--format {'|'.join(TABLE_FORMATS)}")
        if self.table_format == "parquet":
            output.require("pyarrow", "tables", "Writing parquet")
        if self.table_format == "imagefolder" and self.table is not None:
            check_imagefolder(outline(asked), self.table)
        elsewhere = Option("output", "another.jsonl")
        places = (self.results, elsewhere), (self.table, elsewhere), (self.report, Option("report", "answers.html"))
        replaces = self.resume or self.force
        outputs = [Output(path, option, replaces, resumable=True) for path, option in places if path is not None]
        if self.table_format == "webdataset" and self.results is not None:  # all that are there, as all may go
            shards = (path for path in shards_beside(self.results) if path != self.table)
            outputs += [Output(path, elsewhere, replaces, resumable=True) for path in shards]
        if self.sidecars is not None:
            beside = Option("sidecar_dir", "FOLDER")
            outputs += [Output(self.sidecars.place_of(request.id), beside, replaces=True) for request in outline(asked)]
        check_outputs(outputs, inputs)


def read_captions(
    context: typer.Context,
    sidecar: str | None,
    sidecar_dir: Path | None,
    existing: str,
    prefix: str,
    suffix: str,
    as_written: bool,
    results: Path | None,
) -> SidecarSettings | None:
    """What is to be written beside pictures. Raises InputError."""
    from pixtral_runtime.batch.sidecars import SidecarSettings
    from pixtral_runtime.errors import InputError

    if sidecar is None:
        own = ("sidecar_dir", "existing", "prefix", "suffix", "as_written")
        refuse_unused(context, own, "without --sidecar", "--sidecar .txt")
        return None
    captions = SidecarSettings(sidecar, sidecar_dir, existing, prefix, suffix, as_written)
    if existing in ("append", "prepend") and results is None:
        raise InputError(
            f"--existing {existing} needs an output file, which keeps what stood there before: a run that is killed "
            "would do it twice",
            "-o results.jsonl",
        )
    return captions


def read_source_settings(
    prompts: PromptBuilder,
    recursive: bool,
    column: str | None,
    fetch: bool,
    pages: str | None,
    per: Sequence[str],
    every: str | None,
    frames: int | None,
) -> SourceSettings:
    """How what is named is to be read. Raises SettingError."""
    from pixtral_runtime.errors import Option, SettingError
    from pixtral_runtime.sources.documents import DocumentSettings
    from pixtral_runtime.sources.open import SourceSettings
    from pixtral_runtime.sources.pages import PageRange, parse_pages
    from pixtral_runtime.sources.video import VideoSettings, parse_every

    if unknown := set(per) - set(PER):
        raise SettingError(f"there is no record for each {min(unknown)!r}", Option("per", PER))
    video = VideoSettings(None if every is None else parse_every(every), frames, "frame" in per)
    documents = DocumentSettings(
        fit=prompts.preprocess.drawn_size,
        pages=PageRange() if pages is None else parse_pages(pages),
        per_document="document" in per,
        video=video,
    )
    with_videos = every is not None or frames is not None or bool({"frame", "clip"} & set(per))
    return SourceSettings(documents, recursive, column, fetch, with_videos)


@dataclass(frozen=True)
class Asked:
    """What a job is asked, the files on the disk that it reads, and the sidecars that it writes.

    Without `has_documents` nothing that is named has pages or frames, without `has_datasets` nothing is a table.
    """

    requests: Requests
    files: Sequence[Path]
    sidecars: Sidecars | None
    has_documents: bool = False
    has_datasets: bool = False


def read_asked(
    paths: list[str],
    prompts: list[str],
    requests: Path | None,
    system: str | None,
    max_new_tokens: int,
    settings: SourceSettings,
    shard: str | None,
    limit: int | None,
    captions: SidecarSettings | None,
    before: Path | None,
) -> Asked:
    """What the arguments ask for, but for what has a sidecar already.

    `before` is the file of results that the run goes on with. Raises InputError.
    """
    from pixtral_runtime.batch.item_requests import Questions, requests_of_items
    from pixtral_runtime.batch.prompt_template import PromptTemplate, read_tags
    from pixtral_runtime.batch.record_lines import read_results
    from pixtral_runtime.batch.request_file import read_request_file, read_requests
    from pixtral_runtime.batch.shards import parse_shard, share_of
    from pixtral_runtime.batch.sidecars import Sidecars, sidecar_places
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.text_file import text_lines
    from pixtral_runtime.sources.open import open_source

    folders: Mapping[Path, Path] = {}
    if (requests is None) == (not paths):
        raise InputError("name either images or a file of requests", "pixtral run BUNDLE photos/, or --requests FILE")
    questions = [] if requests else read_questions(prompts)
    templates = [PromptTemplate(question) for question in questions]
    has_tags = any(template.has_tags for template in templates)
    wants_records = captions is not None or has_tags
    done = read_results(before).records if wants_records and before is not None and before.exists() else {}

    def tags_of(id: str, picture: Path) -> str:
        """As they were when it was asked: the sidecar may have the answer by now."""
        if id in done and (asked_with := done[id].tags) is not None:
            return asked_with
        return read_tags(
            picture, None if captions is None else captions.place(picture, folders.get(picture, picture.parent))
        )

    asked: Requests
    files: Sequence[Path]
    has_documents = has_datasets = False
    if requests == STDIN:
        lines, name = text_lines(sys.stdin.buffer, "standard input"), "standard input"
        asked = read_requests(lines, name, max_new_tokens=max_new_tokens, system=system, folder=Path())
        files = _pictures_of(asked)
    elif requests is not None:
        asked = read_request_file(requests, max_new_tokens=max_new_tokens, system=system)
        files = [requests, *_pictures_of(asked)]
        folders = dict.fromkeys(files[1:], requests.parent)
    else:
        documents = replace(settings.documents, wants_text=any(template.has_text for template in templates))
        opened = open_source(paths, sys.stdin.buffer, replace(settings, documents=documents), output.talk)
        folders, files = opened.folders, opened.source.files
        has_documents, has_datasets = opened.has_documents, opened.has_datasets
        asked = requests_of_items(opened.source, Questions(questions, system, max_new_tokens, tags_of))
        if isinstance(asked, Sequence) and has_tags:
            asked = list(asked)  # with the tags that are there before anything is written
    # other shards write sidecars as well, and none may have the place of one of these
    sidecars = None if captions is None else Sidecars(captions, sidecar_places(asked, captions, folders))
    share = asked if shard is None else share_of(asked, *parse_shard(shard))
    share = share if limit is None else share[:limit]
    left = share if sidecars is None else sidecars.left_to_ask(list(share), done)
    return Asked(left, files, sidecars, has_documents, has_datasets)


def read_questions(prompts: Iterable[str]) -> list[str]:
    """What to ask; what looks like a placeholder and is none is warned of. Raises InputError."""
    from pixtral_runtime.batch.prompt_template import PromptTemplate

    questions = [read_prompt(text) for text in prompts]
    for unknown in dict.fromkeys(found for text in questions for found in PromptTemplate(text).unknown):
        output.warn(f"{unknown} stays in the prompt as it is; {KNOWN_PLACEHOLDERS} are filled in")
    return questions


def _pictures_of(requests: Iterable[Request]) -> list[Path]:
    """The files that requests name."""
    images = (image for request in requests for image in request.images)
    files = (image if isinstance(image, Path) else image.file for image in images)
    return [path for path in files if path is not None]
