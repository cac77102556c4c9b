"""`pixtral check`: does a bundle compute what its checkpoint means, TensorRT what it does, and both what is known?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.engine_report import Failure, against_network, verdict
from pixtral_cli.golden_report import against_golden
from pixtral_cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    LoraOption,
    ThreadsOption,
    open_prompts,
    refuse_unused,
    refuse_unused_by_backend,
)

EPILOG = "Example: pixtral check bundle --against checkpoint/"


def check(
    context: typer.Context,
    bundle: BundleArgument,
    against: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from, a folder or a hub id, run in torch.")
    ] = None,
    lora: LoraOption = None,
    engine: Annotated[
        str | None,
        typer.Option(help="A target of 'pixtral build', such as rtx:sm89: what TensorRT understood and compiled."),
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Pixtral-12B's known answers, about pictures of this folder."),
    ] = None,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare torch, ONNX Runtime and TensorRT, stage by stage.

    The inputs: images of several sizes, and prompts with 0 to 4 images; with --golden what Pixtral-12B has answered.
    """
    from pixtral_runtime.errors import CheckFailed, InputError

    if against is None and engine is None and golden is None:
        ways = "--against CHECKPOINT, --engine rtx:sm89, or --golden FOLDER"
        raise InputError("nothing to compare with", f"pixtral check {bundle} {ways}")
    if golden is None:
        refuse_unused(context, ("backend", "device"), "without --golden", "--golden FOLDER")
    if against is None:
        refuse_unused(context, ("lora",), "without --against", "--against CHECKPOINT")
        refuse_unused_by_backend(context, backend)
    if against is None and golden is None:
        refuse_unused(context, ("threads",), "without --against", "--against CHECKPOINT")
    results: dict[str, Any] = {}
    failures: list[Failure] = []
    if against is not None:
        failures += _against_checkpoint(bundle, against, lora, threads, results, show=not as_json)
    if engine is not None:
        failures += against_network(bundle, engine, results, show=not as_json)
    if golden is not None:
        failures += against_golden(context, bundle, golden, backend, threads, results, show=not as_json)
    if as_json:
        output.print_json({"verdict": "FAILED" if failures else "PASSED", **results})
    if failures:
        raise CheckFailed(*failures[0])


def _against_checkpoint(
    bundle: Path, against: str, lora: Path | None, threads: int, results: dict[str, Any], *, show: bool
) -> list[Failure]:
    """Torch against ONNX Runtime."""
    output.require("torch", "export", "Checking against a checkpoint")
    from pixtral_export.check import check_bundle, check_lora, load_reference
    from pixtral_export.checkpoint.hub import fetch_weights, has_other_activations, open_source
    from pixtral_runtime.device.memory import available_memory_bytes
    from pixtral_runtime.generation.model import load_bundle

    prompts = open_prompts(bundle, "mistral", None, None)
    is_kept = has_other_activations(prompts.bundle.model)
    opened = open_source(against, keep_activations=is_kept, lora=lora)
    check_lora(prompts.bundle, opened)
    checkpoint = fetch_weights(against, opened)
    reference = load_reference(checkpoint, prompts.bundle.limits.max_context, available_memory_bytes())
    model = load_bundle(prompts.bundle, prompts, threads=threads, backend="ort-cpu")
    seen = []
    for comparison in check_bundle(model, reference):
        seen.append(comparison)
        output.verbose(f"{comparison.stage:8} {comparison.case:10} {comparison.error:.1e}")
    worst = {
        stage: max((c for c in seen if c.stage == stage), key=lambda c: c.error) for stage in {c.stage: 0 for c in seen}
    }
    failed = [comparison for comparison in seen if not comparison.passed]
    results["comparisons"] = [asdict(c) | {"passed": c.passed} for c in seen]
    if show:
        header = ("stage", "worst case", "tensor", "error", "tolerance", "")
        rows = [
            (c.stage, c.case, c.tensor, f"{c.error:.1e}", f"{c.tolerance:.0e}", "ok" if c.passed else "FAILED")
            for c in worst.values()
        ]
        output.print_table(header, rows)
        output.print_line(verdict(len(failed), len(seen), "torch and ONNX Runtime"))
    return [
        (
            f"{c.stage} with {c.case}: {c.tensor} differs by {c.error:.1e} of its largest value, "
            f"{c.tolerance:.0e} is allowed",
            f"pixtral export {against} -o {bundle} --force, with --dtype float32 if the dtype is the cause",
        )
        for c in failed
    ]
