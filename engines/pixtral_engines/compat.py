"""The same graphs for TensorRT 10.3 (JetPack 6), which predates the operators of opset 22 and later.

Attention becomes MatMul and Softmax, RotaryEmbedding and RMSNormalization arithmetic, TensorScatter ScatterElements.
Opset 21 is the first whose DequantizeLinear has int4 and blocks, so that quantized weights stay as they are. Numbers
are those of the portable graph up to rounding; a replaced node's name starts the names of those in its place.

Shapes: B batch, N query heads, K key/value heads, G = N/K, T tokens, C cache rows, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pixtral_engines.lowering import replace_nodes, scatter_into_cache
from pixtral_runtime.errors import InputError

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 21, 10


def lower_for_trt10_3(model: onnx.ModelProto) -> None:
    """Rewrite a graph whose cache rows are fixed. Raises InputError where it holds types of a later opset."""
    from onnx import TensorProto

    if any(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in model.graph.initializer):
        raise InputError("TensorRT 10.3 has no float4", "pixtral export CHECKPOINT -o BUNDLE --precision int4")
    rewriter = _Rewriter(model)
    scatter_into_cache(model, every_type=True)
    rewriter.rewrite()
    model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION


class _Rewriter:
    """Replaces nodes one by one, with types and shapes as the portable graph has them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self._model = model
        self._nodes: list[onnx.NodeProto] = []
        self._constants: set[str] = set()
        self._gathered: dict[tuple[str, str], str] = {}
        graph = onnx.shape_inference.infer_shapes(model).graph
        self._types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output, *graph.value_info)}

    def rewrite(self) -> None:
        replacements: dict[str, Callable[[onnx.NodeProto], None]] = {
            "Attention": self._attention,
            "RotaryEmbedding": self._rotary_embedding,
            "RMSNormalization": self._rms_normalization,
        }
        for node in self._model.graph.node:
            replacements.get(node.op_type, self._nodes.append)(node)
        replace_nodes(self._model, self._nodes)

    def _attention(self, node: onnx.NodeProto) -> None:
        """softmax(q kᵀ / √E + mask) v. The queries of a key/value head stand below each other: keys are not copied."""
        q, k, v, *mask = node.input
        _, heads, _, head_dim = self._shape(q)
        _, kv_heads, _, _ = self._shape(k)
        grouped = self._constant(f"grouped_{kv_heads}", np.array([0, kv_heads, -1, 0]))
        apart = self._constant(f"apart_{heads}", np.array([0, heads, -1, 0]))
        scale = self._constant(f"scale_{head_dim}", np.array(head_dim**-0.5, self._dtype(q)))
        scaled = self._add("Mul", [q, scale], node)
        rows = self._add("Reshape", [scaled, grouped], node)  # (B, K, G·T, E)
        keys = self._add("Transpose", [k], node, perm=[0, 1, 3, 2])
        scores = self._add("Reshape", [self._add("MatMul", [rows, keys], node), apart], node)  # (B, N, T, C)
        if mask:
            lowest = self._constant("lowest", np.array(np.finfo(self._dtype(q)).min))
            scores = self._add("Where", [mask[0], scores, lowest], node)
        weights = self._add("Reshape", [self._add("Softmax", [scores], node, axis=-1), grouped], node)
        self._add("Reshape", [self._add("MatMul", [weights, v], node), apart], node, output=node.output[0])

    def _rotary_embedding(self, node: onnx.NodeProto) -> None:
        """Rotate the halves of (B, N, T, E) by the angles of their positions."""
        x, cos, sin, positions = node.input
        c, s = self._angles(cos, positions, node), self._angles(sin, positions, node)  # (B, 1, T, E/2)
        halves = [f"{node.name}.first", f"{node.name}.second"]
        self._emit("Split", [x], halves, f"{node.name}.split", axis=-1, num_outputs=2)
        parts = {half + of: self._add("Mul", [half, of], node) for half in halves for of in (c, s)}
        first = self._add("Sub", [parts[halves[0] + c], parts[halves[1] + s]], node)
        second = self._add("Add", [parts[halves[1] + c], parts[halves[0] + s]], node)
        self._add("Concat", [first, second], node, axis=-1, output=node.output[0])

    def _angles(self, table: str, positions: str, node: onnx.NodeProto) -> str:
        """Rows of a table for each position, once for all layers."""
        if (table, positions) not in self._gathered:
            rows = self._add("Gather", [table, positions], node, axis=0)
            axis = self._constant("head_axis", np.array([1]))
            self._gathered[table, positions] = self._add("Unsqueeze", [rows, axis], node)
        return self._gathered[table, positions]

    def _rms_normalization(self, node: onnx.NodeProto) -> None:
        """x / √(mean(x²) + ε) in float32, rounded, then times the weight (specification section 1.3)."""
        from onnx import TensorProto, helper

        x, weight = node.input
        epsilon = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "epsilon")
        eps = self._constant(f"epsilon_{epsilon:g}", np.array(epsilon, np.float32))
        last = self._constant("last_axis", np.array([-1]))
        wide = self._add("Cast", [x], node, to=TensorProto.FLOAT)
        mean = self._add("ReduceMean", [self._add("Mul", [wide, wide], node), last], node, keepdims=1)
        root = self._add("Sqrt", [self._add("Add", [mean, eps], node)], node)
        narrow = self._add("Cast", [self._add("Div", [wide, root], node)], node, to=self._types[x].elem_type)
        self._add("Mul", [narrow, weight], node, output=node.output[0])

    def _add(self, op: str, inputs: list[str], node: onnx.NodeProto, *, output: str = "", **attributes: Any) -> str:
        name = f"{node.name}.{op.lower()}{len(self._nodes)}"
        self._emit(op, inputs, [output or f"{name}_output"], name, **attributes)
        return output or f"{name}_output"

    def _emit(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        name = f"compat_{name}"
        if name not in self._constants:
            self._constants.add(name)
            self._model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _shape(self, name: str) -> list[int]:
        return [dim.dim_value for dim in self._types[name].shape.dim]

    def _dtype(self, name: str) -> np.dtype[Any]:
        from onnx import helper

        return np.dtype(helper.tensor_dtype_to_np_dtype(self._types[name].elem_type))
