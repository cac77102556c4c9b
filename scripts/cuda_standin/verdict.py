"""What is wrong with an observation: the rules that the CUDA backend is held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cuda_standin.records import (
    COPIED_CACHE,
    CPU_NODE,
    DECODE,
    HOST_COPY,
    MASKED,
    RECORDED,
    Copies,
    Nodes,
    Observation,
    Step,
)

FUSED = ("flash_fwd_kernel", "flash_fwd_splitkv_kernel", "cudnnBackendExecute")
UNFUSED = ("UnfusedSoftmaxKernel",)
ATTENTION = {"float16": FUSED, "float32": UNFUSED}  # Flash and cuDNN have no float32
OTHER_ATTENTION = ("attention_kernel_batched_impl",)  # the memory-efficient one
FEED_COPIES = 2  # one for each graph of a step
SHAPE_BYTES = 64  # of an output on the CPU: sizes of tensors, which are there already
EXPECTED = {  # of each planted fault, words of a finding
    MASKED: "attention by",
    HOST_COPY: "to the host",
    CPU_NODE: "Asinh",
    COPIED_CACHE: "copied within the device",
}


def wrong_nodes(graph: str, nodes: Nodes) -> Iterator[str]:
    """Only the vision graph may compute shapes on the CPU."""
    on_cpu = sorted(nodes.kinds.get("CPU", {}))
    if on_cpu and graph != "vision":
        yield f"{graph}: {', '.join(on_cpu)} on the CPU"
    elif nodes.largest_cpu_output_bytes > SHAPE_BYTES:
        yield f"{graph}: {nodes.largest_cpu_output_bytes} bytes made on the CPU, by one of {', '.join(on_cpu)}"
    for kinds in nodes.kinds.values():
        yield from (f"{graph}: {count} {kind}" for kind, count in kinds.items() if kind.startswith("Memcpy"))
    if "CUDA" not in nodes.kinds:
        yield f"{graph}: nothing on CUDA"


def wrong_copies(step: Step, cache_slot_bytes: int) -> Iterator[str]:
    """Feeds go to the device, candidates come from it, and the cache stays where it is."""
    copies = step.report.copies
    down, up, within = (copies.get(d, Copies()) for d in ("device to host", "host to device", "device to device"))
    if (down.count, down.bytes) != (1, step.picked_bytes):
        yield f"{down.count} copies, {down.bytes} bytes, to the host, not 1 of {step.picked_bytes}"
    if (up.count, up.bytes) != (FEED_COPIES, step.feed_bytes):
        yield f"{up.count} copies, {up.bytes} bytes, to the device, not {FEED_COPIES} of {step.feed_bytes}"
    if within.bytes >= step.slots * cache_slot_bytes:
        yield f"{within.bytes} bytes copied within the device, as many as the keys of a layer"


def attention_kernels(launches: Mapping[str, int]) -> dict[str, int]:
    """Those that are known, with their grids."""
    known = (*FUSED, *UNFUSED, *OTHER_ATTENTION)
    return {name: count for name, count in launches.items() if name.partition(" ")[0] in known}


def wrong_kernels(step: Step, observation: Observation) -> Iterator[str]:
    """One fused kernel of attention a layer, and nothing beside a CUDA graph."""
    launches = {**step.report.launched, **step.report.replayed}
    seen, wanted = attention_kernels(launches), ATTENTION[observation.dtype]
    if any(name.partition(" ")[0] not in wanted for name in seen) or sum(seen.values()) != observation.layers:
        named = ", ".join(f"{count} {name}" for name, count in seen.items()) or "no kernel that is known"
        yield f"attention by {named}, not {observation.layers} of {', '.join(wanted)}"
    if (step.launches if step.name == RECORDED else step.replayed) or not launches:
        yield f"{step.launches} launches, and {step.replayed} by a CUDA graph"


def faults(observation: Observation) -> list[str]:
    """What is not as it must be."""
    found = [fault for graph, nodes in observation.nodes.items() for fault in wrong_nodes(graph, nodes)]
    for step in observation.steps:
        wrong = (*wrong_copies(step, observation.cache_slot_bytes), *wrong_kernels(step, observation))
        found += [f"{step.name} of {step.slots}: {fault}" for fault in wrong]
    plain, recorded = (
        {step.slots: step.launches + step.replayed for step in observation.steps if step.name == name}
        for name in (DECODE, RECORDED)
    )
    if recorded and plain != recorded:
        found.append(f"launches by slots: {plain} without a CUDA graph, {recorded} with one")
    return found


def shown(observation: Observation) -> dict[str, Any]:
    """The line of a recipe, without all kernels."""
    return {
        "nodes": {
            graph: {provider: sum(kinds.values()) for provider, kinds in nodes.kinds.items()}
            for graph, nodes in observation.nodes.items()
        },
        "attention": observation.attention,
        "steps": [
            {
                "step": f"{step.name} of {step.slots}",
                "launches": step.launches,
                "by a CUDA graph": step.replayed,
                "attention": attention_kernels({**step.report.launched, **step.report.replayed}),
                "copies": {direction: asdict(copies) for direction, copies in step.report.copies.items()},
            }
            for step in observation.steps
        ],
    }
