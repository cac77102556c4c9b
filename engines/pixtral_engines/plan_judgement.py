"""Is what TensorRT compiled for a decode step what the step needs? Found in the plan: `compiled_plan`.

A decode step is bound by the bytes that it moves: weights and cache once, and next to nothing else. What moves more is
named with the nodes it was compiled from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pixtral_engines.compiled_plan import Kernel, PlanTensor, Program, read_programs, refuse_unknown_version
from pixtral_runtime.bundle.decoder_parts import engine_specs
from pixtral_runtime.bundle.engine_list import Engine, EngineSet
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import ROPE_MARK, weight_bytes

MOST_MOVED = 1.10
"""Bytes that a decode step may move, as a multiple of those it cannot do without."""
FAST_ATTENTION = "_gemv_mha"  # reads grouped heads where they lie; the others multiply matrices of one row
QUANTIZED = ("int4", "fp4", "int8", "fp8")
LEAST_ISLAND_BYTES = 1 << 20  # smaller ones cost nothing: norms, positions, scales


@dataclass(frozen=True)
class PlanFault:
    """A kernel of a decode step that should not be there; `bytes` is what it moves."""

    kind: str
    kernel: str
    layers: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.kind} ({self.bytes / 1e6:.1f} MB; nodes {', '.join(self.layers[:3]) or 'unknown'})"


@dataclass(frozen=True)
class PlanJudgement:
    """A decode step of one slot, as compiled. `least_bytes`: weights, cache and logits once."""

    decode: Program
    prefill: Program | None
    moved_bytes: int
    least_bytes: int
    faults: tuple[PlanFault, ...]

    @property
    def moved_share(self) -> float:
        return self.moved_bytes / self.least_bytes

    @property
    def passed(self) -> bool:
        return not self.faults and self.moved_share <= MOST_MOVED

    def to_dict(self) -> dict[str, Any]:
        return {
            "moved_bytes": self.moved_bytes,
            "least_bytes": self.least_bytes,
            "kernels": {"decode": _listed(self.decode), "prefill": _listed(self.prefill) if self.prefill else None},
            "faults": [str(fault) for fault in self.faults],
        }


def judge_decoder(bundle: Bundle, engines: EngineSet, package: ModuleType) -> PlanJudgement:
    """Judge the decoder's plan, or those of its parts. Raises EngineError where plans of this TensorRT are unknown."""
    refuse_unknown_version(package)
    parts = [engines.graphs[name] for name in engine_specs(bundle.graph_spec("decoder"), engines.cuts)]
    plans = [read_programs(bundle.path / part.file) for part in parts]
    return judge(bundle, [chained(programs) for programs in zip(*plans, strict=True)], parts[0], engines.context)


def chained(parts: Sequence[Program]) -> Program:
    """The programs of a decoder's parts as one."""
    outputs = tuple(name for part in parts for name in part.outputs)
    return Program(parts[0].profile, outputs, tuple(kernel for part in parts for kernel in part.kernels))


def judge(bundle: Bundle, programs: list[Program], engine: Engine, rows: int) -> PlanJudgement:
    """Judge what was compiled for a decoder's decode profile, the one of fewest tokens, of an engine of `rows` rows."""
    most_tokens = [profile["T"][2] for profile in engine.profiles]
    decode = programs[most_tokens.index(min(most_tokens))]
    prefill = programs[most_tokens.index(max(most_tokens))]
    return PlanJudgement(
        decode,
        prefill if prefill is not decode else None,
        sum(kernel.moved_bytes for kernel in decode.kernels),
        least_bytes(bundle, rows),
        tuple(plan_faults(decode, _cache_bytes(bundle, rows))),
    )


def least_bytes(bundle: Bundle, rows: int) -> int:
    """What a decode step of one slot reads and writes at the least: weights, all rows of the cache, logits."""
    sizes = weight_bytes(bundle.graph_path("decoder"))
    weights = sum(size for name, size in sizes.items() if ROPE_MARK not in name)
    caches = len(bundle.graph_spec("decoder").caches)
    return weights + caches * _cache_bytes(bundle, rows) + 4 * bundle.model.decoder.vocab_size


def _cache_bytes(bundle: Bundle, rows: int) -> int:
    """Of one layer's keys, or values, in a slot."""
    decoder = bundle.model.decoder
    return decoder.n_kv_heads * rows * decoder.head_dim * 2


def plan_faults(program: Program, cache_bytes: int) -> Iterator[PlanFault]:
    """What a decode step's program should not hold. `cache_bytes`: of one layer's keys in a slot."""
    for kernel in program.kernels:
        for kind in _kinds(kernel, program.outputs, cache_bytes):
            yield PlanFault(kind, kernel.name, kernel.layers, kernel.moved_bytes)
    if not any(kernel.is_attention for kernel in program.kernels):
        yield PlanFault("attends without a kernel of its own", "the step", (), 0)


def _kinds(kernel: Kernel, outputs: Sequence[str], cache_bytes: int) -> Iterator[str]:
    made = [tensor for tensor in kernel.writes if tensor in kernel.moves and tensor.name not in outputs]
    read = [tensor for tensor in kernel.reads if tensor in kernel.moves]
    if kernel.is_attention:
        if FAST_ATTENTION not in kernel.name:
            yield "attends as a product of matrices"
    elif not kernel.is_product:
        if any(_is_cache(tensor) for tensor in read) and any(tensor.bytes >= cache_bytes for tensor in made):
            yield "copies the cache"
        codes = [tensor for tensor in read if tensor.is_constant and tensor.type in QUANTIZED]
        if any(_values(out) >= _values(code) > 1 for code in codes for out in made):
            yield "widens a weight by itself"
    wide = [tensor for tensor in read if tensor.type == "float" and tensor.name not in outputs]
    computes = kernel.is_product or kernel.is_attention
    if any((computes and not tensor.is_constant) or tensor.bytes >= LEAST_ISLAND_BYTES for tensor in wide):
        yield "computes in float32"


def _is_cache(tensor: PlanTensor) -> bool:
    return tensor.name.startswith(("past_", "present_"))


def _values(tensor: PlanTensor) -> int:
    return math.prod(dim or 1 for dim in tensor.dims)


def _listed(program: Program) -> list[dict[str, Any]]:
    return [
        {"kind": kernel.kind, "name": kernel.name, "bytes": kernel.moved_bytes, "nodes": list(kernel.layers)}
        for kernel in program.kernels
    ]
