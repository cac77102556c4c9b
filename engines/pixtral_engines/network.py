"""A graph of a bundle as TensorRT reads it: a strongly typed network, with what the importer changed found out.

The importer drops inputs of nodes without a word: `Attention` loses its `nonpad_kv_seqlen`, and would look at stale
cache rows. The builder's warning "Unused Input" tells only where nothing else reads that input, and only once an
engine is being built. So every value that a node of the graph reads is looked for among what TensorRT reads for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pixtral_engines.lowered_graph import lower
from pixtral_engines.lowering import BESIDE
from pixtral_engines.lowering_trt10_3 import COMPAT, COMPAT_OPSET
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import log_of
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GraphSpec
from pixtral_runtime.errors import BundleError, EngineError, MachineError

if TYPE_CHECKING:
    import onnx

STASHED = ("RMSNormalization", "LayerNormalization", "GroupNormalization")
"""Operators that say in an attribute, float32 by default, what they compute in."""


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and all that must live as long: it refers to the parser's and the weight files' memory uncounted."""

    trt: ModuleType
    network: Any  # INetworkDefinition
    builder: Any
    parser: Any
    weights: tuple[Array, ...]
    warnings: tuple[str, ...]  # of the importer
    dropped: tuple[tuple[str, str], ...]  # node and input that it reads in the graph but not in the network
    widened: tuple[str, ...]  # layers that compute in float32 where the graph does not say so


def parse_graph(
    bundle: Bundle,
    graph: str,
    trt: ModuleType,
    cache_rows: int,
    *,
    compat: bool = False,
    part: GraphSpec | None = None,
    cuts: Sequence[int] = (),
) -> ParsedNetwork:
    """Parse vision, embed or decoder with a cache of `cache_rows` rows. Raises InputError where TensorRT cannot.

    `compat`: in the form for TensorRT 10.3. `part` and `cuts`: those of `lower`.
    """
    path = bundle.graph_path(graph)
    lowered = lower(path, cache_rows, compat=compat, part=part, cuts=cuts)
    parsed = parse_model(lowered.model, path, trt, lowered.made)
    refuse_dropped_inputs(parsed, path)
    return parsed


def parse_model(
    model: onnx.ModelProto, path: Path, trt: ModuleType, made: Mapping[str, Array] = MappingProxyType({})
) -> ParsedNetwork:
    """Parse a model whose weight files lie beside `path`; they are mapped, not read. `made` are weights beside it.

    Raises InputError where TensorRT cannot read it, MachineError where it is too old to know an operator.
    """
    log = log_of(trt)
    before = len(log.warnings)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    weights: tuple[Array, ...] = ()
    if hasattr(parser, "load_initializer"):
        is_read = parser.load_model_proto(model.SerializeToString(), str(path))
        weights = _map_weights(model, path.parent, parser, made) if is_read else ()
        is_read = is_read and parser.parse_model_proto()
    else:  # before TensorRT 10.13: it reads the weight files itself
        is_read = parser.parse(model.SerializeToString(), str(path))
    if not is_read:
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        _refuse_old_package(errors, model, path, trt)
        complaints = "; ".join(map(_complaint, errors))
        raise EngineError(f"{path}: {trt.__name__} {trt.__version__} cannot read it: {complaints}", _upgrade(trt))
    layers = [_Layer.of(network.get_layer(n)) for n in range(network.num_layers)]
    return ParsedNetwork(
        trt=trt,
        network=network,
        builder=builder,
        parser=parser,
        weights=weights,
        warnings=tuple(log.warnings[before:]),
        dropped=tuple(_dropped_inputs(layers, model)),
        widened=tuple(_widened_layers(layers, model)),
    )


def refuse_dropped_inputs(parsed: ParsedNetwork, path: Path) -> None:
    """Raise EngineError where TensorRT would compute without something that the graph computes with."""
    if parsed.dropped:
        names = ", ".join(f"'{value}' of node '{node}'" for node, value in parsed.dropped)
        raise EngineError(
            f"{path}: {parsed.trt.__name__} drops the input {names}: engines would compute something else",
            "write the graph without it, or use a TensorRT that knows it: " + _upgrade(parsed.trt),
        )


def _map_weights(model: onnx.ModelProto, folder: Path, parser: Any, made: Mapping[str, Array]) -> tuple[Array, ...]:
    files: dict[str, Array] = {}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            name, length = place["location"], int(place["length"])
            if name != BESIDE and name not in files:
                files[name] = np.memmap(folder / name, np.uint8, "r")
            data, start = made[tensor.name] if name == BESIDE else files[name], int(place.get("offset", 0))
            is_whole = start + length <= data.nbytes
            if not is_whole or not parser.load_initializer(tensor.name, data.ctypes.data + start, length):
                raise BundleError(
                    f"{folder / name}: bytes {start} to {start + length} do not hold {tensor.name}",
                    "pixtral export CHECKPOINT -o BUNDLE --force",
                )
    return (*files.values(), *made.values())


def _refuse_old_package(errors: list[Any], model: onnx.ModelProto, path: Path, trt: ModuleType) -> None:
    """Raise MachineError where the importer knows no such operator: it then looks for a plugin of that name."""
    unknown = [e for e in errors if e.code().name == "UNSUPPORTED_NODE" or "Plugin not found" in e.desc()]
    if not unknown:
        return
    remedies = [_upgrade(trt)]
    if trt.__name__ == "tensorrt" and max(entry.version for entry in model.opset_import) > COMPAT_OPSET:
        remedies.insert(0, f"pixtral build {path.parent} --target trt --compat {COMPAT}")
    first = unknown[0]
    raise MachineError(
        f"{trt.__name__} {trt.__version__} is too old for {path}: it does not know {first.node_operator()}, "
        f"the operator of node '{first.node_name()}'",
        *remedies,
    )


def _complaint(error: Any) -> str:
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _upgrade(trt: ModuleType) -> str:
    return f"pip install --upgrade {trt.__name__.replace('_', '-')}"


@dataclass(frozen=True)
class _Layer:
    """Names of a layer and its tensors; `node` is the ONNX node it was made for, empty where it is a helper."""

    name: str
    node: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_float32: bool

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        inputs = [layer.get_input(n) for n in range(layer.num_inputs)]
        outputs = [layer.get_output(n) for n in range(layer.num_outputs)]
        return cls(
            name=layer.name,
            node=layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]"),
            inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
            outputs=tuple(tensor.name for tensor in outputs),
            is_float32=any(tensor.dtype.name == "FLOAT" for tensor in outputs),
        )


def _dropped_inputs(layers: list[_Layer], model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Node and input, where no layer on the way from the node's inputs to its output reads the input.

    Tensors of a network keep their ONNX names. Left out are values that come from weights or shapes alone: TensorRT
    folds them.
    """
    made_by = {name: layer for layer in layers for name in layer.outputs}
    known = {value.name for value in model.graph.input} | set(made_by)
    computed = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and computed.intersection(node.input):
            computed.update(node.output)
    for node in model.graph.node:
        wanted = [name for name in node.input if name in computed and name in known]
        outputs = [made_by[name] for name in node.output if name in made_by]
        if node.op_type in ("Shape", "Size") or not outputs:
            continue
        reached: set[str] = set()
        todo = outputs
        while todo:
            for name in todo.pop().inputs:
                if name not in reached:
                    reached.add(name)
                    todo += [made_by[name]] if name in made_by and name not in computed else []
        yield from ((node.name or node.output[0], name) for name in wanted if name not in reached)


def _widened_layers(layers: list[_Layer], model: onnx.ModelProto) -> Iterator[str]:
    """Layers with float32 outputs made for a node whose inputs and outputs are narrower."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    wide = {
        node.name
        for node in model.graph.node
        if node.op_type in STASHED
        or any(types.get(name) == onnx.TensorProto.FLOAT for name in (*node.input, *node.output))
    }
    narrow = {node.name for node in model.graph.node} - wide - {""}
    yield from (layer.name for layer in layers if layer.is_float32 and layer.node in narrow)
