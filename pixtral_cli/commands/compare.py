"""`pixtral compare`: how much a second bundle of a model differs from the first, on the user's own images and texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import (
    ExifOption,
    ImageTokensOption,
    JsonOption,
    MaxImageSideOption,
    MaxNewTokensOption,
    ThreadsOption,
    output_file,
    refuse_unused,
)

if TYPE_CHECKING:
    from pixtral_runtime.compare.result import BundleComparison

EPILOG = "Example: pixtral compare bundle bundle-int4 --images photos/ --html compare.html"
SHOWN_ROWS = 8  # rows of a table; all of them are in the JSON document and the page


def compare(
    context: typer.Context,
    bundle_a: Annotated[Path, typer.Argument(help="The reference, such as a float16 bundle.")],
    bundle_b: Annotated[Path, typer.Argument(help="Another bundle of the same model, such as a quantized one.")],
    images: Annotated[
        list[str] | None, typer.Option(help="Images, a folder or a glob; repeatable. Without it prompts stand alone.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, # for comments; otherwise asks for a short description.")
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="A .txt, .md or .jsonl file or a folder of them, to read and not to answer; repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many images, or prompts alone, and pieces of texts.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 32,
    max_image_side: MaxImageSideOption = None,
    image_tokens: ImageTokensOption = None,
    exif: ExifOption = True,
    threads: ThreadsOption = 0,
    html: Annotated[
        Path | None, typer.Option(parser=output_file, metavar="PATH", help="Write a page with charts and both answers.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two bundles of one model: logits, layers, answers, speed."""
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.compare.compare import DEFAULT_PROMPT, CompareSettings, compare_bundles, read_prompts
    from pixtral_runtime.compare.page import compare_page
    from pixtral_runtime.errors import Option
    from pixtral_runtime.files import Output, check_outputs, write_text_atomically
    from pixtral_runtime.inputs.image_files import collect_images
    from pixtral_runtime.inputs.text_windows import read_texts, text_files

    if not images:
        refuse_unused(context, ("max_image_side", "image_tokens", "exif"), "without --images", "--images FOLDER")
    if texts and not images and prompts is None:
        refuse_unused(context, ("max_new_tokens",), "with --texts alone", "--images FOLDER")
    if html is None:
        refuse_unused(context, ("force",), "without --html", "--html compare.html")
    reference, candidate = open_bundle(bundle_a), open_bundle(bundle_b)
    asked = read_prompts(prompts) if prompts is not None else [] if texts and not images else [DEFAULT_PROMPT]
    named = collect_images(images, sys.stdin.buffer, note=output.talk) if images else []
    paths = named[:limit]
    files = [path for place in texts or () for path in text_files(place, Option("texts", "FILE"))]
    if html is not None:
        inputs = (*files, *reference.own_files, *candidate.own_files, *named, *([prompts] if prompts else []))
        check_outputs([Output(html, Option("html", "compare.html"), force)], inputs)
    if not images and prompts is None and not texts:
        output.warn("no images given, so one prompt alone is compared; add --images FOLDER")
    settings = CompareSettings(max_new_tokens, exif, max_image_side, image_tokens, threads, limit, output.hint_of)
    with output.progress() as bars:
        read = list(read_texts(files))
        report = compare_bundles(
            reference, candidate, paths, asked if paths else asked[:limit], settings, progress=bars.stage, read=read
        )
    if as_json:
        output.print_json(report.to_dict())
    else:
        _print(report)
    if html is not None:
        write_text_atomically(html, compare_page(report))
        output.talk(f"the page is {html}")
    for skipped in report.skipped:
        output.error_line(skipped.reason, skipped.hint)
    if report.skipped:
        raise typer.Exit(5)


def _print(report: BundleComparison) -> None:
    from pixtral_runtime.compare.result import db_text, speed_text

    logits, answers = report.logits, report.answers
    said = {}
    if answers is not None:
        said["same_answer"] = f"{answers.exact_match:.2%} of the answers"
        said["answer_similarity"] = f"{answers.similarity_mean:.3f}"
    output.print_pairs(
        {
            "kl_mean_nats": f"{logits.kl_mean_nats:.2e} over {logits.positions} tokens of {len(report.cases)} cases",
            "kl_median_nats": f"{logits.kl_median_nats:.2e}",
            "kl_p95_nats": f"{logits.kl_p95_nats:.2e}",
            "kl_max_nats": f"{logits.kl_max_nats:.2e}",
            "top1_agreement": f"{logits.top1_agreement:.2%}",
            "disagreements": f"{logits.disagreements}, {logits.near_ties} of them near-ties",
            "image_features": db_text(report.image_features_db) if report.images else "no images",
            "worst_layer": "none, all are exact"
            if report.worst_layer is None
            else f"{report.worst_layer.layer}, {report.worst_layer.tensor}: {db_text(report.worst_layer.snr_db)}",
        }
        | said
    )
    layers = sorted(report.layers, key=lambda layer: layer.worst_db)[:SHOWN_ROWS]
    output.print_table(
        ("layer, noisiest first", "key", "value"),
        [(str(n.layer), db_text(n.key_db), db_text(n.value_db)) for n in layers],
    )
    cases = sorted(report.cases, key=lambda case: -case.kl_mean_nats)[:SHOWN_ROWS]
    output.print_table(
        ("image or text, largest KL first", "prompt", "KL mean", "top-1", "first diverging", "similarity"),
        [
            (
                c.image or c.text or "-", _short(c.prompt), f"{c.kl_mean_nats:.2e}", f"{c.top1_agreement:.1%}",
                "-" if c.first_diverging_token is None else str(c.first_diverging_token),
                "-" if c.similarity is None else f"{c.similarity:.3f}",
            )
            for c in cases
        ],
    )  # fmt: skip
    sides = (report.reference, report.candidate)
    output.print_table(
        ("", "reference", "candidate"),
        [
            ("bundle", *(s.bundle for s in sides)),
            ("fingerprint", *(s.fingerprint for s in sides)),
            ("precision", *(s.precision for s in sides)),
            ("dtype", *(s.dtype for s in sides)),
            ("size", *(output.size(s.bundle_bytes) for s in sides)),
            ("load", *(f"{s.load_s:.2f} s" for s in sides)),
            ("prefill, median", *(speed_text(s.prefill_tokens_per_s) for s in sides)),
            ("decode, median", *(speed_text(s.decode_tokens_per_s) for s in sides)),
        ],
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 32 else line[:31] + "…"
