"""Rewrites of a bundle's graphs that TensorRT asks for. Each keeps the numbers as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def fix_cache_rows(model: onnx.ModelProto, rows: int) -> None:
    """Write the number of cache rows into inputs and outputs: TensorRT takes no dynamic one."""
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = rows


def drop_zero_points(model: onnx.ModelProto) -> None:
    """Take away zero points that are all zero: TensorRT's are, and it takes none for scales of blocks."""
    made_by = {node.output[0]: node for node in model.graph.node}
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        zeros = made_by.get(node.input[2]) if node.op_type == "DequantizeLinear" and len(node.input) > 2 else None
        if zeros is not None and zeros.op_type == "ConstantOfShape":
            kept.remove(zeros)
            del node.input[2]
        kept.append(node)
    replace_nodes(model, kept)


def scatter_into_cache(model: onnx.ModelProto, *, every_type: bool = False) -> None:
    """Replace TensorScatter by ScatterElements where the cache holds int8, which TensorRT's cache operator refuses.

    `every_type`: for a TensorRT that has no such operator.

    The tokens of a call have consecutive positions, so a token's row is as far from its slot's `write_index` as its
    position is from the first one.
    """
    from onnx import TensorProto, helper, numpy_helper

    inputs = model.graph.input
    caches = {v.name for v in inputs if every_type or v.type.tensor_type.elem_type == TensorProto.INT8}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "TensorScatter" or node.input[0] not in caches:
            nodes.append(node)
            continue
        past, codes = node.input[:2]
        if not any(made.output[0] == "cache_rows" for made in nodes):
            constants = {"cache_zero": [0], "cache_one": [1], "cache_axes": [1, 3]}
            model.graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
            nodes += [
                helper.make_node("Slice", ["position_ids", "cache_zero", "cache_one", "cache_one"], ["cache_first"]),
                helper.make_node("Sub", ["position_ids", "cache_first"], ["cache_steps"]),  # (B, T)
                helper.make_node("Unsqueeze", ["write_index", "cache_one"], ["cache_start"]),
                helper.make_node("Add", ["cache_start", "cache_steps"], ["cache_places"]),
                helper.make_node("Unsqueeze", ["cache_places", "cache_axes"], ["cache_rows"]),  # (B, 1, T, 1)
            ]
        shape, rows = f"{past}_shape", f"{past}_rows"
        nodes.append(helper.make_node("Shape", [codes], [shape]))
        nodes.append(helper.make_node("Expand", ["cache_rows", shape], [rows]))
        scatter = helper.make_node("ScatterElements", [past, rows, codes], node.output, node.name, axis=2)
        nodes.append(scatter)
    replace_nodes(model, nodes)


def dequantize_before_gather(model: onnx.ModelProto) -> None:
    """Turn Gather(codes), Gather(scales), DequantizeLinear into DequantizeLinear, Gather.

    TensorRT takes int8 constants only where DequantizeLinear reads them ("Quantized constant is only allowed before
    DQ"). The portable graph has it the other way round, because ONNX Runtime would dequantize the whole table.
    """
    made_by = {node.output[0]: node for node in model.graph.node}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        codes, scales = (made_by.get(name) for name in (*node.input, "", "")[:2])
        if node.op_type == "DequantizeLinear" and codes and scales and codes.op_type == scales.op_type == "Gather":
            nodes.remove(codes)
            nodes.remove(scales)
            rows, table = node.output[0], f"{node.output[0]}_table"
            node.input[:], node.output[:] = [codes.input[0], scales.input[0]], [table]
            codes.input[0], codes.output[0] = table, rows
            nodes += [node, codes]
        else:
            nodes.append(node)
    replace_nodes(model, nodes)


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Give a graph other nodes, some of which may be its own."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
