"""What `pixtral check --golden` says: known answers of Pixtral-12B beside a bundle's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pixtral_cli import output
from pixtral_cli.options import open_model, open_prompts, warn_of_unused

if TYPE_CHECKING:
    from pixtral_runtime.compare.golden import GoldenCheck


def against_golden(
    context: typer.Context,
    bundle: Path,
    folder: Path,
    backend: str,
    threads: int,
    results: dict[str, Any],
    *,
    show: bool,
) -> list[tuple[str, str]]:
    """What differs, and what to type next. Requests whose pictures the folder lacks are named, with what gets them."""
    from pixtral_runtime.compare.golden import check_request, find_pictures, packaged_golden, refuse_other_models
    from pixtral_runtime.errors import ContextError

    golden = packaged_golden()
    prompts = open_prompts(bundle, "mistral", None, None)
    refuse_other_models(prompts.bundle, golden)
    found = find_pictures(folder, golden)
    for picture in found.values():
        if picture.is_known is False:
            output.warn(f"{picture.path} is another file than the known one: servers and decoders differ a little")
    model = open_model(prompts, backend, threads)
    warn_of_unused(context, model.backend)
    checks: list[GoldenCheck] = []
    skipped: list[dict[str, str]] = []
    too_long: ContextError | None = None
    for request in golden.requests:
        if missing := golden.missing(request, found):
            reason, hint = "pictures are missing", "; ".join(picture.download(folder) for picture in missing)
        else:
            try:
                checks.append(check_request(model, golden, request, found))
                continue
            except ContextError as error:
                too_long = error
                reason, hint = str(error), output.hint_of(error)
        output.error_line(f"not checked, {request.name}: {reason}", hint)
        skipped.append({"request": request.name, "reason": reason, "hint": hint})
    if too_long is not None and not checks:
        raise too_long
    results["golden"] = {
        "source": golden.source,
        "backend": model.backend,
        "pictures": {golden.pictures[n].name: {"file": str(f.path), "known": f.is_known} for n, f in found.items()},
        "requests": [asdict(check) | {"passed": not check.faults} for check in checks],
        "not_checked": skipped,
    }
    if show:
        _print(checks, golden.source)
    return [
        (
            f"{check.request}: {fault}",
            f"pixtral inspect {bundle} --verify; pixtral check {bundle} --against CHECKPOINT finds the stage",
        )
        for check in checks
        for fault in check.faults
    ]


def _print(checks: list[GoldenCheck], source: str) -> None:
    header = ("request", "prompt", "of pictures", "mean", "largest", "allowed", "other choices", "")
    rows = []
    for check in checks:
        others = [p for p in check.positions if not p.is_same_choice]
        allowed = f"{check.tolerance.mean_nats}, {check.tolerance.largest_nats} nats"
        choices = f"{len(others)} of {len(check.positions)}"
        if others:
            choices += f", the known leads by {max(p.golden_gap_nats for p in others):.2f} at most"
        result = "FAILED" if check.faults else "ok"
        numbers = (
            f"{check.prompt_tokens}",
            f"{check.image_tokens}",
            f"{check.mean_nats:.3f}",
            f"{check.largest_nats:.3f}",
        )
        rows.append((check.request, *numbers, allowed, choices, result))
        for position in check.positions:
            known = "-" if position.golden_logprob is None else f"{position.golden_logprob:8.3f}"
            output.verbose(f"{position.token!r:16} {known} {position.logprob:8.3f} {position.error_nats:.3f}")
    output.print_table(header, rows)
    for check in checks:
        output.print_pairs({"request": check.request, "known": check.golden_text, "this bundle": check.text})
        for fault in check.faults:
            output.print_line(f"FAILED: {fault}")
    failed = sum(bool(check.faults) for check in checks)
    output.print_line(
        f"{'FAILED' if failed else 'PASSED'}: {len(checks) - failed} of {len(checks)} known answers within tolerance "
        f"({source})"
    )
