"""The options that only `pixtral run` has: what is asked, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli.options import output_file, output_file_or_stdout

PromptsOption = Annotated[
    list[str] | None,
    typer.Option("-p", "--prompt", help="What to ask; @FILE reads it; repeat it for several questions an image."),
]
RequestsOption = Annotated[
    Path | None, typer.Option(help="Requests, a JSON object a line: our own, or OpenAI's batch format.")
]
RecordsOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        parser=output_file_or_stdout,
        metavar="PATH",
        help="Write one JSON record a line; - is stdout.",
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option("--format", help="At the end, write csv, parquet, openai or imagefolder beside the output."),
]
PageOption = Annotated[
    Path | None,
    typer.Option(parser=output_file, metavar="PATH", help="At the end, write a page with pictures and answers."),
]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS|local", help="Share the work out to a Ray cluster's workers.")
]
SidecarOption = Annotated[
    str | None, typer.Option(metavar="SUFFIX", help="Write each answer beside its picture, as in a.jpg and a.txt.")
]
SidecarDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write sidecars below this folder instead, in the same sub-folders.")
]
ExistingOption = Annotated[
    str,
    typer.Option(
        metavar="skip|overwrite|append|prepend", help="What to do where a sidecar exists; skip asks nothing then."
    ),
]
PrefixOption = Annotated[str, typer.Option(metavar="TEXT", help="Before each caption in a sidecar.")]
SuffixOption = Annotated[str, typer.Option(metavar="TEXT", help="Behind each caption in a sidecar.")]
AsWrittenOption = Annotated[
    bool, typer.Option("--as-written", help="Leave line breaks in sidecars; otherwise they become spaces.")
]
