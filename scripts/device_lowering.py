"""A decoder's attention by key length, without a mask: what ONNX Runtime's CUDA runs as Flash attention."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def by_length(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same decoder with each Attention told how many rows hold keys, heads apart, `is_causal` for the rest.

    Right where the positions of a call follow one another, as the runtime's do.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    made_by = {output: node for node in graph.node for output in node.output}
    read_by = {name: node for node in graph.node for name in node.input}
    for name, value in (("last_index", -1), ("one_row", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    nodes = [
        helper.make_node("Gather", ["position_ids", "last_index"], ["last_position"], axis=1),
        helper.make_node("Add", ["last_position", "one_row"], ["key_rows"]),
    ]
    folds = set()
    for node in graph.node:
        if node.op_type == "Attention":
            fold, unfold = made_by[node.input[0]], read_by[node.output[0]]
            if (fold.op_type, unfold.op_type) != ("Reshape", "Reshape"):
                raise ValueError(f"{node.name} is no Attention over folded rows")
            folds |= {fold.output[0], unfold.output[0]}
            inputs = [fold.input[0], *node.input[1:3], "", "", "", "key_rows"]
            kept = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            nodes.append(
                helper.make_node("Attention", inputs, unfold.output[:1], name=node.name, **(kept | {"is_causal": 1}))
            )
    others = [node for node in graph.node if node.op_type != "Attention" and node.output[0] not in folds]
    order = {output: place for place, node in enumerate(graph.node) for output in node.output}
    nodes[2:] = sorted([*nodes[2:], *others], key=lambda node: order[node.output[0]])
    while True:  # what made the mask is read by none now
        read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
        live = [node for node in nodes if read & set(node.output)]
        if len(live) == len(nodes):
            break
        nodes = live
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return lowered


def packed_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with products of blocked codes as the MatMulNBits that ONNX Runtime makes of them, which loads
    without its repacking. The codes' bytes are taken as they lie, so this is for random weights alone.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    graph = packed.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in products:
            continue
        maker = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if maker is None:
            nodes.append(node)
            continue
        codes, scales = (initializers[name] for name in maker.input[:2])
        block = next(item.i for item in maker.attribute if item.name == "block_size")
        bits = 4 if codes.data_type == onnx.TensorProto.INT4 else 8
        rows, columns = codes.dims
        codes.data_type = onnx.TensorProto.UINT8
        codes.dims[:] = [columns, rows // block, block * bits // 8]
        scales.dims[:] = [columns * (rows // block)]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [node.input[0], codes.name, scales.name], node.output[:1], name=node.name,
                domain="com.microsoft", K=rows, N=columns, bits=bits, block_size=block, accuracy_level=4,
            )
        )  # fmt: skip
    del graph.node[:]
    graph.node.extend(nodes)
    packed.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return packed
