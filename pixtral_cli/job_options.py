"""The options that only `pixtral run` has: what is asked, what is written, and which of them do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli.options import STDOUT, output_file, output_file_or_stdout, refuse_unused

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
    typer.Option("--format", help="At the end, also write csv, parquet, webdataset, imagefolder or openai."),
]
EmbedOption = Annotated[
    bool, typer.Option("--embed", help="With --format parquet: the pictures too, as Hugging Face's datasets have them.")
]
PageOption = Annotated[
    Path | None,
    typer.Option(parser=output_file, metavar="PATH", help="At the end, write a page with pictures and answers."),
]
ColumnOption = Annotated[str | None, typer.Option(metavar="NAME", help="The column of a table that has pictures.")]
FetchOption = Annotated[bool, typer.Option("--fetch", help="Fetch pictures that tables name by their addresses.")]
PagesOption = Annotated[
    str | None, typer.Option(metavar="1-3,7,10-", help="The pages of documents to ask about. Default: all.")
]
PerOption = Annotated[
    list[str] | None,
    typer.Option(metavar="page|document|frame|clip", help="What to make a record of. Default: a page, and a clip."),
]
EveryOption = Annotated[str | None, typer.Option(metavar="TIME", help="See a frame of a video so often, as in 2s.")]
FramesOption = Annotated[
    int | None, typer.Option(min=1, help="See so many frames of a video, evenly spread. Default: 8.")
]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS|local", help="Share the work out to a Ray cluster's workers.")
]
WatchOption = Annotated[
    bool, typer.Option("--watch", help="Go on with what comes into the folders, until Ctrl-C. Needs --output.")
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


def refuse_what_does_nothing(context: typer.Context) -> None:
    """Raise InputError for options of `pixtral run` that would do nothing beside the others."""
    given = context.params
    results = given["results"]
    if given["watch"]:
        refuse_unused(context, ("requests", "shard", "ray", "ray_workers"), "with --watch")
    if given["requests"] is not None:
        of_pictures = ("prompt", "recursive", "column", "fetch", "pages", "per", "every", "frames")
        refuse_unused(context, of_pictures, "with --requests")
    if given["ray"] is None:
        refuse_unused(context, ("ray_workers",), "without --ray", "--ray local")
    if results == STDOUT:
        refuse_unused(context, ("as_json",), "with --output -, which prints records")
    if results in (None, STDOUT) and given["report"] is None:
        refuse_unused(context, ("force",), "without --output", "-o results.jsonl")
    if given["resume"]:
        refuse_unused(context, ("force",), "with --resume, which keeps the file")
    if given["table"] != "csv":
        refuse_unused(context, ("formulas",), "without --format csv", "--format csv")
    if given["table"] != "parquet":
        refuse_unused(context, ("embed",), "without --format parquet", "--format parquet")
