"""What rewrites of a graph share: constants, nodes put in place of others, and what nothing reads any more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx


def add_constants(model: onnx.ModelProto, **values: object) -> None:
    from onnx import numpy_helper

    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in values.items())


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # deleting empties the originals
    del model.graph.node[:]
    model.graph.node.extend(kept)


def mapped(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """A tensor of the weight file, of a type that has a byte or more."""
    from onnx import helper

    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims))


def untie(model: onnx.ModelProto, folder: Path) -> dict[str, tuple[npt.NDArray[Any], int]]:
    """Take away nodes that turn a weight of the file around, (V, D) to (D, V): heads that are their embeddings.

    Returns the values that are to be handed over instead, and ONNX's number of their type. ONNX Runtime's CPU provider
    turns them by itself; others would do it in every step, or read codes only where they are constants.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    turned = [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    values = {}
    for node in turned:
        tensor = stored[node.input[0]]
        values[node.output[0]] = np.ascontiguousarray(mapped(tensor, folder).T), tensor.data_type
    if turned:
        replace_nodes(model, [node for node in model.graph.node if node not in turned])
        drop_unread(model)
    return values


def put_heads_apart(model: onnx.ModelProto) -> bool:
    """Undo the folding of query heads that share a key head. Returns whether there was any; masks stay as they are.

    The portable graph puts such queries below each other, for kernels of CPUs that then take a key once.
    """
    maker = {output: node for node in model.graph.node for output in node.output}
    reader = {name: node for node in model.graph.node for name in node.input}
    folds: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "Attention":
            continue
        fold, unfold = maker[node.input[0]], reader[node.output[0]]
        if (fold.op_type, unfold.op_type) == ("Reshape", "Reshape"):
            folds |= {fold.output[0], unfold.output[0]}
            node.input[0], node.output[0] = fold.input[0], unfold.output[0]
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape" and node.output[0] in folds]
    replace_nodes(model, [node for node in model.graph.node if node not in reshapes])
    return bool(folds)


def drop_unread(model: onnx.ModelProto) -> None:
    """Take away nodes whose outputs nothing reads, and values that no node reads then."""
    nodes, size = list(model.graph.node), -1
    while len(nodes) != size:
        size = len(nodes)
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        nodes = [node for node in nodes if any(output in read for output in node.output)]
    replace_nodes(model, nodes)
    values = [value for value in model.graph.initializer if value.name in read]
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
