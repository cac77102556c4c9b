"""Rewrites of a bundle's graphs that TensorRT asks for. Each keeps the numbers as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.backends.onnx_nodes import add_constants, drop_unread, mapped, put_heads_apart, replace_nodes
from pixtral_runtime.backends.session import Array

if TYPE_CHECKING:
    import onnx

BESIDE = "beside"  # instead of a file's name: values that were made here
CODES_AT_A_TIME = 1 << 26


def fix_cache_rows(model: onnx.ModelProto, rows: int) -> None:
    """Write the number of cache rows into inputs, outputs and where the graph asks a cache for it.

    TensorRT takes no dynamic one.
    """

    dims: dict[str, list[int]] = {}
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = rows
        dims[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        asked = dims.get(node.input[0], [])[ends.get("start", 0) : ends.get("end")] if node.op_type == "Shape" else []
        if asked and all(asked):
            add_constants(model, **{node.output[0]: asked})
        else:
            nodes.append(node)
    replace_nodes(model, nodes)


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


def attend_with_heads_apart(model: onnx.ModelProto) -> None:
    """Query heads apart instead of below each other, and a mask of T rows instead of G·T.

    TensorRT copies the whole cache before each attention of folded heads; with heads apart and one token, its kernel
    reads the cache where it lies.
    """
    if not put_heads_apart(model):
        return
    for node in model.graph.node:
        if node.op_type == "Concat" and set(node.input) == {"position_ids"}:  # one for each query head of a key head
            for other in model.graph.node:
                other.input[:] = ["position_ids" if name == node.output[0] else name for name in other.input]
    drop_unread(model)


def halve_codes(
    model: onnx.ModelProto, folder: Path, made: Mapping[str, Array] = MappingProxyType({})
) -> dict[str, Array]:
    """Turn products by int8 in blocks along K into products by int4 of twice the rows. Returns their weights by name,
    and those of `made`, which are in no file, where they are still read.

    TensorRT widens a whole weight of int8 blocks to float16 before each product, five times the traffic, and computes
    int4 blocks as it reads them. A code is 16 · high + low + 8 with high and low within int4: rows of `high` have 16
    times the scales, and what the 8 stands for is the sum of x over each block, times 8 scales.
    """
    from onnx import TensorProto, helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    maker = {output: node for node in model.graph.node for output in node.output}
    weights: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        wide = maker.get(node.input[1]) if node.op_type == "MatMul" else None
        if wide is None or not (block := _int8_block(wide, stored)):
            nodes.append(node)
            continue
        nodes.remove(wide)
        codes, scale = (stored[name] for name in wide.input)
        values, scales = (made[one.name] if one.name in made else mapped(one, folder) for one in (codes, scale))
        name, x = f"{codes.name}.halves", node.input[0]
        (rows, columns), blocks = codes.dims, len(scales)
        for key, data, kind, dims in (
            (name, _halves(values), TensorProto.INT4, (2 * rows, columns)),
            (f"{name}.scale", np.concatenate([scales * 16, scales]), scale.data_type, (2 * blocks, columns)),
            (f"{name}.eight", scales * 8, scale.data_type, (blocks, columns)),
        ):
            weights[key] = data
            model.graph.initializer.append(declared(key, data, kind, dims))
        of_block = np.repeat(np.eye(blocks, dtype=scales.dtype), block, 0)  # (K, blocks)
        model.graph.initializer.append(numpy_helper.from_array(of_block, f"{name}.of_block"))
        quantized = [name, f"{name}.scale"]
        nodes += [
            helper.make_node("Concat", [x, x], [f"{name}.x"], f"{name}.x", axis=-1),
            helper.make_node("DequantizeLinear", quantized, [f"{name}.wide"], wide.name, axis=0, block_size=block),
            helper.make_node("MatMul", [f"{name}.x", f"{name}.wide"], [f"{name}.signed"], node.name),
            helper.make_node("MatMul", [x, f"{name}.of_block"], [f"{name}.sums"], f"{name}.sums"),
            helper.make_node("MatMul", [f"{name}.sums", f"{name}.eight"], [f"{name}.offset"], f"{name}.offset"),
            helper.make_node("Add", [f"{name}.signed", f"{name}.offset"], node.output, f"{name}.add"),
        ]
    replace_nodes(model, nodes)
    if made:
        drop_unread(model)
    left = {tensor.name for tensor in model.graph.initializer}
    return weights | {name: data for name, data in made.items() if name in left}


def _int8_block(wide: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> int:
    """Rows of a block, where a node widens a stored matrix of int8 in blocks along its rows; otherwise 0."""
    from onnx import TensorProto

    if wide.op_type != "DequantizeLinear" or len(wide.input) != 2 or not all(name in stored for name in wide.input):
        return 0
    values = {attribute.name: attribute.i for attribute in wide.attribute}
    is_int8 = stored[wide.input[0]].data_type == TensorProto.INT8
    return values.get("block_size", 0) if is_int8 and values.get("axis", 1) == 0 else 0


def _halves(codes: Array) -> Array:
    """int8 (K, N) as int4 (2K, N), packed: the upper halves of all codes, then the lower ones less 8."""
    packed = np.empty((2, codes.size // 2), np.uint8)
    flat = codes.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CODES_AT_A_TIME):
        part, at = flat[start : start + CODES_AT_A_TIME], slice(start // 2, (start + CODES_AT_A_TIME) // 2)
        high, low = part >> 4, (part & 15) ^ 8
        packed[0, at] = high[0::2] | high[1::2] << 4
        packed[1, at] = low[0::2] | low[1::2] << 4
    return packed.reshape(-1)


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


def declared(name: str, data: Array, kind: int, dims: Sequence[int]) -> onnx.TensorProto:
    """What stands in a graph for values that are handed over beside it."""
    import onnx

    tensor = onnx.TensorProto(name=name, dims=dims, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", BESIDE), ("length", str(data.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
