"""What rewrites of a graph share: constants, nodes put in place of others, and what nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def add_constants(model: onnx.ModelProto, **values: object) -> None:
    from onnx import numpy_helper

    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in values.items())


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # deleting empties the originals
    del model.graph.node[:]
    model.graph.node.extend(kept)


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
