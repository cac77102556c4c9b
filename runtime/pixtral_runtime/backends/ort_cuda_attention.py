"""A decoder's attention, rewritten for ONNX Runtime's CUDA provider. Letters are those of `ort_cuda_lowering`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pixtral_runtime.backends.onnx_nodes import add_constants, drop_unread, put_heads_apart, replace_nodes

if TYPE_CHECKING:
    import onnx

KEY_LENGTHS = "key_lengths"
HEADS_FIRST = [0, 2, 1, 3]  # (B, T, heads, E) to (B, heads, T, E), and back


def attend_by_length(model: onnx.ModelProto) -> None:
    """Attention up to each slot's last new token instead of by a mask, with query heads apart.

    Any mask rules Flash attention out; the memory-efficient kernel that is left runs a decode step on K thread blocks
    a slot and reads all C rows. The tokens of a call have consecutive positions, so the mask says the same as causal
    attention over position + 1 rows. Flash takes a key once for the query heads that share it by itself.
    """
    from onnx import helper

    put_heads_apart(model)
    for node in model.graph.node:
        if node.op_type == "Attention" and len(node.input) > 3:
            inputs = [*node.input[:3], "", "", "", KEY_LENGTHS]
            node.CopyFrom(helper.make_node("Attention", inputs, node.output, name=node.name, is_causal=1))
    if not any(KEY_LENGTHS in node.input for node in model.graph.node):
        return
    add_constants(model, last_token=-1, one_row=1)
    lengths = [
        helper.make_node("Gather", ["position_ids", "last_token"], ["last_position"], axis=1),
        helper.make_node("Add", ["last_position", "one_row"], [KEY_LENGTHS]),
    ]
    replace_nodes(model, [*lengths, *model.graph.node])
    drop_unread(model)


def put_rows_first(model: onnx.ModelProto) -> bool:
    """Queries, keys, values, the cache and the result stay (B, rows, heads · E). Returns whether they do.

    Products give and take such rows, and Flash and cuDNN read them. With heads first a step of one token copies all
    four, and attention turns queries and result back once more. Past and present tensors become
    (B, C, K · E). float16 only: the kernel that is left for float32 would turn the whole cache around. A graph that is
    made in another way is left as it is.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    by_length = [node for node in graph.node if node.op_type == "Attention" and KEY_LENGTHS in node.input]
    if not by_length or graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT16:
        return False
    maker = {output: node for node in graph.node for output in node.output}
    reader = {name: node for node in graph.node for name in node.input}
    recipes = _reshapes(model)
    heads: dict[str, int] = {}  # of tensors that had them first
    renamed: dict[str, str] = {}
    caches: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for old in graph.node:
        node = type(old).FromString(old.SerializeToString())
        node.input[:] = [renamed.get(name, name) for name in old.input]
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in old.attribute}
        first, result = node.input[0], node.output[0]
        if node.op_type == "Transpose" and settings.get("perm") == HEADS_FIRST:
            joined = reader.get(result)
            if first in heads and joined is not None and joined.output[0] in recipes:
                renamed[joined.output[0]] = first
                del heads[first]
                continue
            if len(recipe := recipes.get(first, [])) == 4:
                renamed[result] = maker[first].input[0]
                heads[renamed[result]] = recipe[2]
                continue
        if not heads.keys() & {*node.input}:
            pass
        elif node.op_type == "RotaryEmbedding" and first in heads:
            _set(node, num_heads=heads[first])
            heads[result] = heads[first]
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and first in heads:
            heads[result] = heads[first]
        elif node.op_type == "TensorScatter" and node.input[1] in heads and settings.get("axis") == 2:
            _set(node, axis=1)
            heads[result] = heads[node.input[1]]
            caches |= {first, result}
        elif node.op_type == "Attention" and all(name in heads for name in node.input[:3]):
            _set(node, q_num_heads=heads[first], kv_num_heads=heads[node.input[1]])
            heads[result] = heads[first]
        else:
            return False
        nodes.append(node)
    values = [value for value in (*graph.input, *graph.output) if len(value.type.tensor_type.shape.dim) == 4]
    if not caches or caches != {value.name for value in values}:
        return False
    for value in values:
        batch, key_heads, rows, size = value.type.tensor_type.shape.dim
        shape = [batch.dim_param, rows.dim_param, key_heads.dim_value * size.dim_value]
        value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape))
    replace_nodes(model, nodes)
    drop_unread(model)
    return True


def _reshapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shapes that are stored in a graph, by the outputs of the nodes that give them."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.output[0]: numpy_helper.to_array(stored[node.input[1]]).tolist()
        for node in model.graph.node
        if node.op_type == "Reshape" and node.input[1] in stored
    }


def _set(node: onnx.NodeProto, **settings: int) -> None:
    from onnx import helper

    kept = [attribute for attribute in node.attribute if attribute.name not in settings]
    made = [helper.make_attribute(name, value) for name, value in settings.items()]
    node.CopyFrom(
        type(node)(op_type=node.op_type, name=node.name, input=node.input, output=node.output, attribute=[*kept, *made])
    )
