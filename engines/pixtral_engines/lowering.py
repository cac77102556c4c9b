"""Rewrites of a bundle's graphs that TensorRT asks for. Each keeps the numbers as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def fix_cache_rows(model: onnx.ModelProto, rows: int) -> None:
    """Write the number of cache rows into inputs and outputs: TensorRT takes no dynamic one."""
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = rows


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
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
