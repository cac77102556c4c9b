"""`pixtral check`: does a bundle compute what its checkpoint means?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import BundleArgument, JsonOption, ThreadsOption, open_prompts

EPILOG = "Example: pixtral check bundle --against checkpoint/"


def check(
    bundle: BundleArgument,
    against: Annotated[str, typer.Option(help="The checkpoint it was made from: a folder or a hub id.")],
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare torch and ONNX Runtime stage by stage, over image sizes and prompts with 0 to 4 images."""
    output.require("torch", "export", "Checking against a checkpoint")
    from pixtral_export.check import check_bundle, load_reference
    from pixtral_export.checkpoint import open_checkpoint
    from pixtral_export.hub import resolve_checkpoint
    from pixtral_runtime.doctor import available_memory_bytes
    from pixtral_runtime.errors import CheckFailed
    from pixtral_runtime.model import load_bundle

    prompts = open_prompts(bundle, "mistral", None, None)
    checkpoint = open_checkpoint(resolve_checkpoint(against))
    reference = load_reference(checkpoint, prompts.bundle.limits.max_context, available_memory_bytes())
    model = load_bundle(prompts.bundle, prompts, threads=threads)
    seen = []
    for comparison in check_bundle(model, reference):
        seen.append(comparison)
        output.verbose(f"{comparison.stage:8} {comparison.case:10} {comparison.error:.1e}")
    worst = {
        stage: max((c for c in seen if c.stage == stage), key=lambda c: c.badness)
        for stage in {c.stage: 0 for c in seen}
    }
    failed = [comparison for comparison in seen if not comparison.passed]
    verdict = "FAILED" if failed else "PASSED"
    if as_json:
        output.print_json({"verdict": verdict, "comparisons": [asdict(c) | {"passed": c.passed} for c in seen]})
    else:
        header = ("stage", "worst case", "tensor", "error", "tolerance", "")
        rows = [
            (c.stage, c.case, c.tensor, f"{c.error:.1e}", f"{c.tolerance:.0e}", "ok" if c.passed else "FAILED")
            for c in worst.values()
        ]
        output.print_table(header, rows)
        output.print_line(f"{verdict}: {len(seen) - len(failed)} of {len(seen)} comparisons within tolerance")
    if failed:
        first = failed[0]
        raise CheckFailed(
            f"{first.stage} with {first.case}: {first.tensor} differs by {first.error:.1e} of its largest value, "
            f"{first.tolerance:.0e} is allowed",
            f"pixtral export {against} -o {bundle} --force, with --dtype float32 if the dtype is the cause",
        )
