"""`pixtral merge`: the results of shards as one file, or as a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import FormulasOption, JsonOption, output_file, refuse_unused

EPILOG = "Example: pixtral merge part-1.jsonl part-2.jsonl -o results.csv"


def merge(
    context: typer.Context,
    results: Annotated[list[Path], typer.Argument(help="Results files of one job, written by 'pixtral run -o'.")],
    target: Annotated[
        Path, typer.Option("-o", "--output", parser=output_file, metavar="PATH", help="The file to write.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="jsonl, csv, parquet, openai or imagefolder.", show_default="as the output's name ends, or jsonl"
        ),
    ] = None,
    formulas: FormulasOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Join results files in the order given.

    An answer takes the place of an error for the same id.
    """
    from pixtral_runtime.batch.shards import merge_results
    from pixtral_runtime.batch.tables import table_format

    written = table_format(target, format)
    if written != "csv":
        refuse_unused(context, ("formulas",), "without --format csv", "--format csv")
    summary = merge_results(results, target, force, written, formulas=formulas)
    for name, lines in summary.torn.items():
        output.warn(f"{name}: {lines} unfinished at its end left out; its run was stopped, or still goes on")
    if as_json:
        output.print_json(asdict(summary) | {"output": str(target), "format": written})
        return
    counts = f"{summary.records} records of {summary.files} files, {summary.failed} of them without an answer"
    output.talk(f"{counts}, are in {target}")
    output.verbose(f"{summary.duplicates} duplicates left out, {summary.recovered} errors replaced by answers")
