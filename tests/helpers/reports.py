"""Results of benchmarks for tests, made up."""

from __future__ import annotations

from pixtral_runtime.bench.cases import Case, CaseResult

CEILINGS = {"bandwidth_bytes_per_s": 3e10, "flops_per_s": {"vision": 4e11, "prefill": 3e11, "decode": 3e11}}
SETTING = {"device": "a <device>", "precision": "int4", "ceilings": CEILINGS}


def latency(side: int = 512, batch: int = 1) -> CaseResult:
    samples = {"image": [1.0], "preprocess": [2.0], "vision": [100.0], "prefill": [50.0], "ttft": [153.0],
               "tpot": [10.0], "e2e": [250.0], "step": [10.0]}  # fmt: skip
    costs = {stage: {"flops": 10**9, "bytes": 10**8} for stage in ("vision", "prefill", "decode")}
    return CaseResult(Case("latency", batch, 11, side), samples, costs=costs)


def serve(rate: float, e2e: float, answered: float) -> CaseResult:
    samples = {"ttft": [e2e / 2], "tpot": [1.0], "e2e": [e2e, e2e * 2], "offered_per_s": [rate]}
    return CaseResult(
        Case("serve", 4, 8, 64, rate=rate), samples | {"requests_per_s": [answered], "tokens_per_s": [8.0]}
    )


def throughput(batch: int) -> CaseResult:
    return CaseResult(
        Case("throughput", batch, 8, 64), {"tokens_per_s": [10.0 * batch], "requests_per_s": [1.0 * batch]}
    )
