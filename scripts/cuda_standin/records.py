"""What was seen over the CUDA stand-in, and how it is read from the stand-in's report and ONNX Runtime's profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MASKED, HOST_COPY, CPU_NODE, COPIED_CACHE = "masked attention", "host copy", "CPU node", "copied cache"
FAULTS = (MASKED, HOST_COPY, CPU_NODE, COPIED_CACHE)  # that are planted
DECODE, RECORDED = "decode", "recorded decode"  # steps; the latter by a CUDA graph
OF_A_LIBRARY = "0x0x0"  # in place of a grid that is not known


@dataclass(frozen=True)
class Copies:
    """Copies of one direction; `largest` in bytes."""

    count: int = 0
    bytes: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Report:
    """What happened since the last reset: launches by kernel and grid, "flash_fwd_kernel 1x4x4", and copies by
    direction. Launches by CUDA graphs are `replayed`; copies count whoever makes them. What cuBLAS and cuDNN launch
    has their function's name, and no grid.
    """

    launched: Mapping[str, int]
    replayed: Mapping[str, int]
    copies: Mapping[str, Copies]


@dataclass(frozen=True)
class Step:
    """One pass through embedding and decoder, and the bytes it is to copy: feeds to the device, candidates from it."""

    name: str
    slots: int
    report: Report
    feed_bytes: int
    picked_bytes: int

    @property
    def launches(self) -> int:
        return sum(self.report.launched.values())

    @property
    def replayed(self) -> int:
        return sum(self.report.replayed.values())


@dataclass(frozen=True)
class Nodes:
    """A graph's nodes as they ran: how many of each kind on each provider, and the largest output on the CPU."""

    kinds: Mapping[str, Mapping[str, int]]
    largest_cpu_output_bytes: int = 0


@dataclass(frozen=True)
class Observation:
    """`attention` is what ONNX Runtime logs of its choice; `cache_slot_bytes` one slot's share of a cache tensor."""

    dtype: str
    layers: int
    cache_slot_bytes: int
    attention: Mapping[str, int]
    nodes: Mapping[str, Nodes]
    steps: Sequence[Step]


def observation_from_dict(data: Mapping[str, Any]) -> Observation:
    """The inverse of `dataclasses.asdict`."""
    steps = [
        Step(**step | {"report": Report(**report | {"copies": _each(Copies, report["copies"])})})
        for step in data["steps"]
        for report in [step["report"]]
    ]
    return Observation(**{**data, "nodes": _each(Nodes, data["nodes"]), "steps": steps})


def _each(kind: Any, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: kind(**value) for name, value in values.items()}


def parse_report(text: str) -> Report:
    """The lines of the stand-in's `standin_report`."""
    kernels: dict[str, Counter[str]] = {"launch": Counter(), "replay": Counter()}
    copies = {}
    for line in text.splitlines():
        kind, *fields = line.split("\t")
        if kind == "copy":
            *numbers, direction = fields
            copies[direction] = Copies(*map(int, numbers))
        else:
            count, grid, signature = fields
            name = signature if grid == OF_A_LIBRARY else f"{short_name(signature)} {grid}"
            kernels[kind][name] += int(count)
    return Report(dict(kernels["launch"]), dict(kernels["replay"]), copies)


def short_name(signature: str) -> str:
    """A kernel's own name, without return type, namespaces, template arguments and parameters."""
    depth, name = 0, ""
    for letter in signature.replace("(anonymous namespace)", ""):
        depth += letter == "<"
        if letter == "(" and depth == 0:
            break
        name += letter if depth == 0 else ""
        depth -= letter == ">"
    return name.split()[-1].rpartition("::")[2]


def parse_profile(events: Sequence[Mapping[str, Any]]) -> Nodes:
    """The nodes of ONNX Runtime's profile of a session that ran once."""
    kinds: dict[str, Counter[str]] = {}
    largest = 0
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            seen = event["args"]
            provider = seen["provider"].removesuffix("ExecutionProvider")
            kinds.setdefault(provider, Counter())[seen["op_name"]] += 1
            if provider == "CPU":
                largest = max(largest, int(seen["output_size"]))
    return Nodes({provider: dict(counted) for provider, counted in kinds.items()}, largest)
