"""A decoder as several engines that run one after the other over one cache.

Building takes memory for the largest engine only, so a board can build in parts what it could not build whole. `cuts`
are the layers with which a further part begins: (10, 20, 30) makes four of 40 layers. Each part hands its hidden states
to the next one, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from pixtral_runtime.bundle.spec import GraphSpec


def engine_specs(graph: GraphSpec, cuts: Sequence[int]) -> dict[str, GraphSpec]:
    """The tensors of each engine of a graph, by its name: `decoder`, or `decoder.1`, `decoder.2`, …; in their order.

    Hidden states that layer 10 takes are called `hidden_10`. Logits and all that belongs to them are the last part's.
    """
    if not graph.caches or not cuts:
        return {graph.name: graph}
    first, *others = graph.inputs
    states = [first, *(replace(first, name=hidden_name(cut)) for cut in cuts)]
    cached = {tensor for pair in graph.caches for tensor in pair}
    specs = {}
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, layers(graph)], strict=True)):
        is_last = end == layers(graph)
        caches = graph.caches[2 * start : 2 * end]
        given = [tensor for tensor in others if tensor not in cached and (is_last or "R" not in tensor.shape)]
        made = [tensor for tensor in graph.outputs if tensor not in cached] if is_last else [states[number + 1]]
        name = f"{graph.name}.{number + 1}"
        inputs, outputs = (states[number], *given), tuple(made)
        specs[name] = GraphSpec(
            name,
            (*inputs, *(past for past, _ in caches)),
            (*outputs, *(present for _, present in caches)),
            caches,
        )
    return specs


def are_cuts(graph: GraphSpec, cuts: Sequence[int]) -> bool:
    """Whether a graph can be cut there: each part has a layer."""
    edges = [0, *cuts, layers(graph)]
    return not cuts or all(low < high for low, high in pairwise(edges))


def layers(graph: GraphSpec) -> int:
    return len(graph.caches) // 2


def hidden_name(layer: int) -> str:
    """The name of the hidden states that a part's first layer takes."""
    return f"hidden_{layer}"
