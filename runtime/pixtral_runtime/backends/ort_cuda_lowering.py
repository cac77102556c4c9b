"""Rewrites of a bundle's graphs for ONNX Runtime's CUDA provider, made in memory when a bundle is opened.

Each keeps the numbers as they are and picks a better kernel. Shapes: B slots, N query heads, K key heads, T tokens,
C cache rows, E head dim, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.errors import BundleError, extra_missing

if TYPE_CHECKING:
    import onnx

KEY_LENGTHS = "key_lengths"


def lowered(path: Path, candidates: int, *, by_length: bool = True) -> bytes:
    """A bundle's graph as the CUDA provider is to get it. Raises MissingPackageError without onnx, BundleError for a
    file that is no graph.

    `candidates` is how many of a row of logits it picks. `by_length` False leaves attention as it is, to measure what
    that brings.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise extra_missing("onnx", "gpu", "Running a bundle on a CUDA device") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"{path} is damaged: {error}", f"pixtral inspect {path.parent} --verify") from error
    if by_length:
        attend_by_length(model)
    widen_gathered_codes(model)
    pick_candidates(model, candidates)
    serialized: bytes = model.SerializeToString()
    return serialized


def attend_by_length(model: onnx.ModelProto) -> None:
    """Attention up to each slot's last new token instead of by a mask, with query heads apart.

    Any mask rules Flash attention out; the memory-efficient kernel that is left runs a decode step on K thread blocks
    a slot and reads all C rows. The tokens of a call have consecutive positions, so the mask says the same as causal
    attention over position + 1 rows. The mask's rows were folded for kernels that take a key once (`ops.attention`);
    Flash does so by itself.
    """
    from onnx import helper

    maker = {output: node for node in model.graph.node for output in node.output}
    reader = {name: node for node in model.graph.node for name in node.input}
    dropped: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Attention" or len(node.input) < 4:
            continue
        query, result = node.input[0], node.output[0]
        fold, unfold = maker[query], reader[result]
        if (fold.op_type, unfold.op_type) == ("Reshape", "Reshape"):
            dropped += [fold, unfold]
            query, result = fold.input[0], unfold.output[0]
        inputs = [query, *node.input[1:3], "", "", "", KEY_LENGTHS]
        node.CopyFrom(helper.make_node("Attention", inputs, [result], name=node.name, is_causal=1))
    if not any(KEY_LENGTHS in node.input for node in model.graph.node):
        return
    _add_constants(model, last_token=-1, one_row=1)
    lengths = [
        helper.make_node("Gather", ["position_ids", "last_token"], ["last_position"], axis=1),
        helper.make_node("Add", ["last_position", "one_row"], [KEY_LENGTHS]),
    ]
    _replace_nodes(model, lengths + [node for node in model.graph.node if node not in dropped])
    _drop_unread(model)


def pick_candidates(model: onnx.ModelProto, count: int) -> None:
    """The `count` best logits of each row, their token ids, and what the row weighs, as one output.

    Adds the input `inverse_temperature` (R,) and the output `picked` (R, 2 · count + 1), float32: logits, ids (exact:
    a vocabulary has less than 2^24) and the sum of exp((logit - best) · inverse_temperature) over the row.
    """
    from onnx import TensorProto, helper

    if not any(value.name == "logits" for value in model.graph.output):
        return
    _add_constants(model, picked_count=[count], picked_first=[0], picked_end=[1], picked_axis=[1])
    model.graph.node.extend(
        [
            helper.make_node("TopK", ["logits", "picked_count"], ["picked_logits", "picked_ids"], axis=1),
            helper.make_node("Cast", ["picked_ids"], ["picked_numbers"], to=TensorProto.FLOAT),
            helper.make_node("Slice", ["picked_logits", "picked_first", "picked_end", "picked_axis"], ["best_logit"]),
            helper.make_node("Sub", ["logits", "best_logit"], ["below_best"]),
            helper.make_node("Unsqueeze", ["inverse_temperature", "picked_axis"], ["inverse_temperatures"]),
            helper.make_node("Mul", ["below_best", "inverse_temperatures"], ["tempered"]),
            helper.make_node("Exp", ["tempered"], ["weights"]),
            helper.make_node("ReduceSum", ["weights", "picked_axis"], ["mass"], keepdims=1),
            helper.make_node("Concat", ["picked_logits", "picked_numbers", "mass"], ["picked"], axis=1),
        ]
    )
    model.graph.input.append(helper.make_tensor_value_info("inverse_temperature", TensorProto.FLOAT, ["R"]))
    model.graph.output.append(helper.make_tensor_value_info("picked", TensorProto.FLOAT, ["R", 2 * count + 1]))


def widen_gathered_codes(model: onnx.ModelProto) -> None:
    """int8 rows of an embedding become float by a cast and a product: CUDA has no kernel for int8 in blocks.

    It claims the DequantizeLinear, and fails when it runs.
    """
    from onnx import helper

    nodes: list[onnx.NodeProto] = []
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        codes = maker.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.op_type != "Gather":
            nodes.append(node)
            continue
        scales = maker[node.input[1]]
        width, blocks = sizes[codes.input[0]][1], sizes[scales.input[0]][1]
        name = node.name
        _add_constants(model, **{f"{name}.blocks": [0, 0, blocks, width // blocks], f"{name}.row": [0, 0, width]})
        _add_constants(model, **{f"{name}.last": [-1]})
        nodes += [
            helper.make_node("Cast", [node.input[0]], [f"{name}.wide"], to=dtypes[scales.input[0]]),
            helper.make_node("Reshape", [f"{name}.wide", f"{name}.blocks"], [f"{name}.codes"]),  # (B, T, blocks, size)
            helper.make_node("Unsqueeze", [node.input[1], f"{name}.last"], [f"{name}.scales"]),  # (B, T, blocks, 1)
            helper.make_node("Mul", [f"{name}.codes", f"{name}.scales"], [f"{name}.product"]),
            helper.make_node("Reshape", [f"{name}.product", f"{name}.row"], [node.output[0]]),
        ]
    _replace_nodes(model, nodes)


def _add_constants(model: onnx.ModelProto, **values: object) -> None:
    from onnx import numpy_helper

    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in values.items())


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # deleting empties the originals
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _drop_unread(model: onnx.ModelProto) -> None:
    """Take away nodes whose outputs nothing reads."""
    nodes = list(model.graph.node)
    while True:
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        live = [node for node in nodes if any(output in read for output in node.output)]
        if len(live) == len(nodes):
            return _replace_nodes(model, live)
        nodes = live
