"""What `pixtral check` says of engines: the network that TensorRT parsed, and the plan that it compiled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_cli import output
from pixtral_cli.options import open_prompts

if TYPE_CHECKING:
    from types import ModuleType

    from pixtral_runtime.bundle.engine_list import EngineSet
    from pixtral_runtime.bundle.manifest import Bundle

Failure = tuple[str, str]
"""What differs, and what to type next."""
LISTED_BYTES = 100_000  # of a tensor, to be named beside the kernel that moves it


def against_network(path: Path, target: str, results: dict[str, Any], *, show: bool) -> list[Failure]:
    """ONNX Runtime against the network that TensorRT parses, and the engines' files against what was built."""
    output.require("onnx", "rtx", "Checking engines")
    from pixtral_engines.check import FLOAT16_LARGEST, NetworkCheck
    from pixtral_engines.targets import parse_targets, refuse_cached_codes
    from pixtral_runtime.backends.trt_package import import_tensorrt, version_of
    from pixtral_runtime.bundle.engine_list import listed_engines, names_of_target, open_engines, verify_engines
    from pixtral_runtime.errors import CheckFailed, InputError

    chosen, *others = parse_targets(target)
    if others:
        raise InputError(f"--engine {target} names several targets", f"--engine {chosen.name}")
    package = import_tensorrt(chosen.flavor)
    prompts = open_prompts(path, "mistral", None, None)
    refuse_cached_codes(prompts.bundle)
    compat, cuts, sets = None, list[int](), []
    is_built = chosen.name in prompts.bundle.engines
    if is_built:
        engines = open_engines(prompts.bundle, chosen.name, version_of(package))
        sets = [listed_engines(prompts.bundle, name) for name in names_of_target(prompts.bundle, chosen.name)]
        for one in sets:
            verify_engines(prompts.bundle, one)
        compat, cuts = engines.compat, engines.cuts
    try:
        check = NetworkCheck(prompts.bundle, prompts, package, compat=compat is not None, cuts=cuts)
    except InputError as error:  # TensorRT drops something, or cannot read it
        raise CheckFailed(str(error), *error.remedies) from error
    seen = []
    for agreement in check.run():
        seen.append(agreement)
        output.verbose(f"{agreement.stage:8} {agreement.case:20} {agreement.tensor} {agreement.error:.1e}")
    activations = {graph: found.worst for graph, found in check.activations.items()}
    failed = [agreement for agreement in seen if not agreement.passed]
    results["network"] = {
        "target": chosen.name,
        "engines": "verified" if is_built else "not built",
        "compat": compat,
        "parts": len(cuts) + 1,
        "comparisons": [asdict(agreement) | {"passed": agreement.passed} for agreement in seen],
        "largest_activations": {graph: found.largest for graph, found in check.activations.items()},
    }
    if show:
        rows = []
        for graph, (layer, largest) in activations.items():
            worst = max((a for a in seen if a.stage == graph), key=lambda a: a.error)
            share = f"{largest:.0f}, {100 * largest / FLOAT16_LARGEST:.1f} %"
            result = "ok" if worst.passed else "FAILED"
            rows.append((graph, worst.case, f"{worst.error:.1e}", f"{worst.tolerance:.0e}", share, layer, result))
        header = ("network", "worst case", "error", "tolerance", "largest, of float16's", "in layer", "")
        output.print_table(header, rows)
        output.print_line(verdict(len(failed), len(seen), f"ONNX Runtime and {package.__name__}'s networks"))
    failures = [
        (
            f"TensorRT understands {a.stage} otherwise: {a.tensor} differs by {a.error:.1e} with {a.case}, "
            f"{a.tolerance:.0e} is allowed; first in layer '{a.layer}'",
            "pixtral doctor, and report the versions it names; do not use these engines",
        )
        for a in failed
    ]
    for one in sets:
        failures += _of_plan(prompts.bundle, one, package, results, show=show)
    return failures


def _of_plan(
    bundle: Bundle, engines: EngineSet, package: ModuleType, results: dict[str, Any], *, show: bool
) -> list[Failure]:
    """What was compiled for a decode step, against what the step needs."""
    from pixtral_engines.plan_judgement import MOST_MOVED, judge_decoder
    from pixtral_runtime.errors import EngineError

    plans = results.setdefault("plans", {})
    try:
        judged = judge_decoder(bundle, engines, package)
    except EngineError as error:  # compiled by a TensorRT whose plans are not known
        plans[engines.target] = {"judged": False, "reason": str(error)}
        output.talk(f"The compiled plan was not judged: {error}")
        return []
    plans[engines.target] = {"judged": True, "passed": judged.passed, **judged.to_dict()}
    for step, program in (("decode", judged.decode), ("prefill", judged.prefill)):
        for kernel in program.kernels if program else ():
            moves = ", ".join(tensor.name for tensor in kernel.moves if tensor.bytes > LISTED_BYTES)
            output.verbose(f"{step:8} {kernel.moved_bytes / 1e6:9.2f} MB  {kernel.name[:60]:60} {moves}")
    if show:
        output.print_line(
            f"{'PASSED' if judged.passed else 'FAILED'}: a decode step over {engines.context:,} rows moves "
            f"{judged.moved_bytes / 1e6:,.1f} MB in {len(judged.decode.kernels)} kernels, {judged.moved_share:.2f} "
            f"times the {judged.least_bytes / 1e6:,.1f} MB it cannot do without"
        )
    excess = f"a decode step moves {judged.moved_share:.2f} times what it must, {MOST_MOVED:.2f} is allowed"
    what = [str(fault) for fault in judged.faults] or ([] if judged.passed else [excess])
    return [(f"the compiled plan is slow: {text}", "pixtral export CHECKPOINT --precision int4") for text in what]


def verdict(failed: int, total: int, what: str) -> str:
    return f"{'FAILED' if failed else 'PASSED'}: {total - failed} of {total} comparisons within tolerance ({what})"
