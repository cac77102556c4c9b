"""A decoder's graph in parts, for engines that are built one after the other: `bundle.decoder_parts`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pixtral_runtime.backends.candidates import with_candidates
from pixtral_runtime.backends.onnx_nodes import replace_nodes
from pixtral_runtime.bundle.decoder_parts import engine_specs, hidden_name
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import ROPE_MARK, weight_bytes
from pixtral_runtime.bundle.spec import ACTIVATION_DTYPES, GraphSpec

if TYPE_CHECKING:
    import onnx

MEMORY_PER_FLOAT_BYTE, MEMORY_PER_CODE_BYTE = 2.0, 2.55
"""What TensorRT takes to compile an engine, of the bytes of its weights. Seen for parts of the 12B in int4: 2.54."""
MEMORY_PER_HALVED_BYTE = 3.6
"""And beside that for a head of int8 blocks, which is made anew (`halve_codes`) and is one large matrix."""
HEADS = ("output.weight", "tok_embeddings.weight")  # the second where the head is the embeddings
LAYER = re.compile(r"layers\.(\d+)\.")  # what names of a layer's nodes and weights begin with


def specs_of(bundle: Bundle, graph: str, cuts: Sequence[int] = (), *, compat: bool = False) -> dict[str, GraphSpec]:
    """The tensors of each engine of a bundle's graph, by its name, as engines have them."""
    return engine_specs(bundle.graph_spec(graph) if compat else with_candidates(bundle, graph), cuts)


def even_cuts(bundle: Bundle, parts: int) -> tuple[int, ...]:
    """Where to cut a decoder into parts that take about as much memory to build; `parts` is 1 to its layers."""
    *layers, head = _layer_memory(bundle)
    cuts: list[int] = []
    total, seen = sum(layers) + head, 0.0
    for layer, size in enumerate(layers):
        most = len(layers) - (parts - 1 - len(cuts))  # the layers behind suffice for a part each
        wanted = total * (len(cuts) + 1) / parts
        if layer and len(cuts) < parts - 1 and (layer >= most or seen + size / 2 > wanted):
            cuts.append(layer)
        seen += size
    return tuple(cuts)


def part_bytes(bundle: Bundle, cuts: Sequence[int]) -> list[int]:
    """Bytes of the weights that each part of a decoder reads."""
    *layers, head = _layer_bytes(bundle)
    tables = sum(size for name, size in weight_bytes(bundle.graph_path("decoder")).items() if ROPE_MARK in name)
    edges = [0, *cuts, len(layers)]
    sizes = [sum(layers[start:end]) + tables for start, end in pairwise(edges)]
    return [*sizes[:-1], sizes[-1] + head]


def part_memory(bundle: Bundle, cuts: Sequence[int]) -> list[int]:
    """Bytes that building each part of a decoder takes beside what TensorRT takes itself."""
    *layers, head = _layer_memory(bundle)
    edges = [0, *cuts, len(layers)]
    sizes = [sum(layers[start:end]) for start, end in pairwise(edges)]
    return [*map(round, sizes[:-1]), round(sizes[-1] + head)]


def memory_per_byte(bundle: Bundle) -> float:
    return MEMORY_PER_FLOAT_BYTE if bundle.precision in ACTIVATION_DTYPES else MEMORY_PER_CODE_BYTE


def _layer_memory(bundle: Bundle) -> list[float]:
    """What building takes for each layer, and last of all for what follows them."""
    sizes = weight_bytes(bundle.graph_path("decoder"))
    scaled = [head for head in HEADS if f"{head}_scale" in sizes]
    halved = sum(sizes[head] + sizes[f"{head}_scale"] for head in scaled)
    *layers, last = (memory_per_byte(bundle) * size for size in _layer_bytes(bundle))
    return [*layers, last + MEMORY_PER_HALVED_BYTE * halved]


def _layer_bytes(bundle: Bundle) -> list[int]:
    """Of each decoder layer's weights, and last of all that follows the layers."""
    sizes = [0] * (bundle.model.decoder.n_layers + 1)
    for name, size in weight_bytes(bundle.graph_path("decoder")).items():
        if ROPE_MARK not in name:
            layer = LAYER.match(name)
            sizes[int(layer[1]) if layer else -1] += size
    return sizes


def take_part(model: onnx.ModelProto, part: GraphSpec, cuts: Sequence[int]) -> None:
    """Leave of a decoder what makes a part's outputs out of its inputs; other graphs, and whole ones, as they are.

    Tensors of the part that the graph does not have are left out: they may be added later.
    """
    if not part.caches or not cuts:
        return
    graph = model.graph
    for cut in cuts:
        _rename(model, _handed_on(model, cut), hidden_name(cut))
    hidden = graph.input[0]
    values = {value.name: value for value in (*graph.input, *graph.output)}
    for cut in cuts:
        values[hidden_name(cut)] = state = type(hidden).FromString(hidden.SerializeToString())
        state.name = hidden_name(cut)
    inputs, outputs = (
        [values[tensor.name] for tensor in tensors if tensor.name in values] for tensors in (part.inputs, part.outputs)
    )
    maker = {output: node for node in graph.node for output in node.output}
    given, wanted = {value.name for value in inputs}, [value.name for value in outputs]
    reached: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in reached:
            reached.add(name)
            wanted += maker[name].input if name in maker and name not in given else ()
    replace_nodes(model, [node for node in graph.node if given.isdisjoint(node.output) and reached & {*node.output}])
    stored = [tensor for tensor in graph.initializer if tensor.name in reached]
    for field, items in ((graph.initializer, stored), (graph.input, inputs), (graph.output, outputs)):
        kept = [type(item).FromString(item.SerializeToString()) for item in items]  # deleting empties the originals
        del field[:]
        field.extend(kept)


def _handed_on(model: onnx.ModelProto, cut: int) -> str:
    """The one tensor that a layer takes from the layer before it."""
    places = {node.name: int(layer[1]) for node in model.graph.node if (layer := LAYER.match(node.name))}
    before = {name for node in model.graph.node if places.get(node.name, cut) < cut for name in node.output}
    read = {name for node in model.graph.node if places.get(node.name, 0) >= cut for name in node.input}
    handed = before & read
    if len(handed) != 1:
        raise RuntimeError(f"layer {cut} takes {sorted(handed)} from those before it")
    return str(handed.pop())


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
