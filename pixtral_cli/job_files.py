"""What `pixtral run` is asked, from its arguments, and the files that it writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.options import STDIN, read_prompt

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Request

TABLE_FORMATS = ("csv", "parquet", "openai")


@dataclass(frozen=True)
class JobFiles:
    """What `pixtral run` writes: records, and at the end a table beside them and a page."""

    results: Path | None
    table_format: str | None
    report: Path | None
    resume: bool
    force: bool
    formulas: bool = False

    @property
    def table(self) -> Path | None:
        if self.results is None or self.table_format is None:
            return None
        suffix = ".openai.jsonl" if self.table_format == "openai" else f".{self.table_format}"
        return self.results.with_suffix(suffix)

    def check(self, inputs: Iterable[Path]) -> None:
        """Refuse what could not be written, before the hours that it may take. Raises InputError, MachineError."""
        from pixtral_runtime.errors import InputError, Option
        from pixtral_runtime.files import Output, check_outputs

        if self.results is None and (self.resume or self.table_format):
            raise InputError(f"{'--resume' if self.resume else '--format'} needs an output file", "-o results.jsonl")
        if self.table_format not in (None, *TABLE_FORMATS):
            raise InputError(f"no table format '{self.table_format}'", f"--format {'|'.join(TABLE_FORMATS)}")
        if self.table_format == "parquet":
            output.require("pyarrow", "tables", "Writing parquet")
        elsewhere = Option("output", "another.jsonl")
        places = (self.results, elsewhere), (self.table, elsewhere), (self.report, Option("report", "answers.html"))
        replaces = self.resume or self.force
        check_outputs(
            [Output(path, option, replaces, resumable=True) for path, option in places if path is not None], inputs
        )


def read_asked(
    paths: list[str],
    prompts: list[str],
    requests: Path | None,
    system: str | None,
    max_new_tokens: int,
    recursive: bool,
    shard: str | None,
) -> list[Request]:
    """What the arguments ask for. Raises InputError."""
    from pixtral_runtime.batch.request_file import read_request_file, read_requests, requests_of_images
    from pixtral_runtime.batch.shards import parse_shard, share_of
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.image_files import collect_images
    from pixtral_runtime.inputs.text_file import text_lines

    if (requests is None) == (not paths):
        raise InputError("name either images or a file of requests", "pixtral run BUNDLE photos/, or --requests FILE")
    if requests == STDIN:
        lines, name = text_lines(sys.stdin.buffer, "standard input"), "standard input"
        asked = read_requests(lines, name, max_new_tokens=max_new_tokens, system=system, folder=Path())
    elif requests is not None:
        asked = read_request_file(requests, max_new_tokens=max_new_tokens, system=system)
    else:
        images = collect_images(paths, sys.stdin.buffer, recursive=recursive, note=output.talk)
        asked = requests_of_images(images, [read_prompt(text) for text in prompts], system, max_new_tokens)
    return asked if shard is None else share_of(asked, *parse_shard(shard))
