"""The same graphs for TensorRT 10.3 (JetPack 6), which predates the operators of opset 22 and later.

Attention becomes MatMul and Softmax, RotaryEmbedding and RMSNormalization arithmetic, TensorScatter ScatterElements.
Opset 21 is the first whose DequantizeLinear has int4 and blocks, so that quantized weights stay as they are; only int8
blocks are multiplied out, since TensorRT has blocks for int4 alone (its operator page "Dequantize", 10.1). Numbers are
those of the portable graph up to rounding; a replaced node's name starts the names of those in its place.

Shapes: B batch, N query heads, K key/value heads, G = N/K, T tokens, C cache rows, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pixtral_runtime.backends.onnx_nodes import replace_nodes
from pixtral_runtime.errors import EngineError

if TYPE_CHECKING:
    import onnx

COMPAT = "trt10.3"  # as users type it
WITHOUT_COMPAT = "build without the compat option"
COMPAT_OPSET, COMPAT_IR_VERSION = 21, 10
MEANT = {
    "Attention": ({"scale"}, (3, 4)),
    "RotaryEmbedding": (set(), (4,)),
    "RMSNormalization": ({"axis", "epsilon"}, (2,)),
}
"""Attributes and numbers of inputs that a replacement heeds. Anything else would be lost without a word."""


def lower_for_trt10_3(model: onnx.ModelProto) -> None:
    """Rewrite a graph whose cache rows are fixed. Raises EngineError where it holds types or nodes of a later opset."""
    from onnx import TensorProto, defs

    hint = "pixtral export CHECKPOINT -o BUNDLE --precision int4"
    if later := {tensor.data_type for tensor in model.graph.initializer if tensor.data_type > TensorProto.INT4}:
        names = ", ".join(TensorProto.DataType.Name(kind).lower() for kind in sorted(later))
        raise EngineError(f"TensorRT 10.3 has no {names}", hint)
    rewriter = _Rewriter(model)
    scatter_into_cache(model)
    rewriter.rewrite()
    if unknown := {node.op_type for node in model.graph.node if not defs.has(node.op_type, COMPAT_OPSET, node.domain)}:
        raise EngineError(f"no form for TensorRT 10.3 of {', '.join(sorted(unknown))}", WITHOUT_COMPAT)
    model.opset_import[0].version, model.ir_version = COMPAT_OPSET, COMPAT_IR_VERSION


def scatter_into_cache(model: onnx.ModelProto) -> None:
    """Replace TensorScatter by ScatterElements.

    The tokens of a call have consecutive positions, so a token's row is as far from its slot's `write_index` as its
    position is from the first one.
    """
    from onnx import helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "TensorScatter":
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
        nodes.append(helper.make_node("ScatterElements", [past, rows, codes], node.output, node.name, axis=2))
    replace_nodes(model, nodes)


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
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def rewrite(self) -> None:
        replacements: dict[str, Callable[[onnx.NodeProto], None]] = {
            "Attention": self._attention,
            "RotaryEmbedding": self._rotary_embedding,
            "RMSNormalization": self._rms_normalization,
            "DequantizeLinear": self._dequantize_linear,
        }
        for node in self._model.graph.node:
            _refuse_unheeded(node)
            replacements.get(node.op_type, self._nodes.append)(node)
        replace_nodes(self._model, self._nodes)

    def _attention(self, node: onnx.NodeProto) -> None:
        """softmax(q kᵀ · scale + mask) v. The queries of a key/value head stand below each other: keys are not copied.

        Softmax stays in the graph's dtype, as in ONNX's own definition: the largest score is subtracted first, and q
        is scaled before the product, whose sums would leave float16 sooner.
        """
        import ml_dtypes

        q, k, v, *mask = node.input
        _, heads, _, head_dim = self._shape(q)
        _, kv_heads, _, _ = self._shape(k)
        grouped = self._constant(f"grouped_{kv_heads}", np.array([0, kv_heads, -1, 0]))
        apart = self._constant(f"apart_{heads}", np.array([0, heads, -1, 0]))
        factor = _attribute(node, "scale", head_dim**-0.5)
        scale = self._constant(f"scale_{factor:g}", np.array(factor, self._dtype(q)))
        scaled = self._add("Mul", [q, scale], node)
        rows = self._add("Reshape", [scaled, grouped], node)  # (B, K, G·T, E)
        keys = self._add("Transpose", [k], node, perm=[0, 1, 3, 2])
        scores = self._add("Reshape", [self._add("MatMul", [rows, keys], node), apart], node)  # (B, N, T, C)
        if mask:
            least = ml_dtypes.finfo(self._dtype(q)).min  # type: ignore[no-untyped-call]
            lowest = self._constant("lowest", np.array(least, self._dtype(q)))
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
        from onnx import TensorProto

        x, weight = node.input
        epsilon = _attribute(node, "epsilon", 1e-5)
        eps = self._constant(f"epsilon_{epsilon:g}", np.array(epsilon, np.float32))
        last = self._constant("last_axis", np.array([-1]))
        wide = self._add("Cast", [x], node, to=TensorProto.FLOAT)
        mean = self._add("ReduceMean", [self._add("Mul", [wide, wide], node), last], node, keepdims=1)
        root = self._add("Sqrt", [self._add("Add", [mean, eps], node)], node)
        narrow = self._add("Cast", [self._add("Div", [wide, root], node)], node, to=self._types[x].elem_type)
        self._add("Mul", [narrow, weight], node, output=node.output[0])

    def _dequantize_linear(self, node: onnx.NodeProto) -> None:
        """Codes of int8 in blocks: as floats, which hold them exactly, times their block's scale."""
        from onnx import TensorProto

        codes, scales = (self._initializers.get(name) for name in node.input[:2])
        if codes is None or scales is None or codes.data_type != TensorProto.INT8 or len(scales.dims) != 2:
            self._nodes.append(node)
            return
        shape = list(codes.dims)
        axis = int(_attribute(node, "axis", 1)) % len(shape)
        blocks = scales.dims[axis]
        split = self._constant(
            f"{node.name}_split", np.array([*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :]])
        )
        within = self._constant(f"within_{axis}", np.array([axis + 1]))
        factors = self._add("Unsqueeze", [scales.name, within], node)
        one = self._constant(f"one_{scales.data_type}", np.array(1, _numpy_type(scales.data_type)))
        wide = self._add("Reshape", [self._add("DequantizeLinear", [codes.name, one], node), split], node)
        scaled = self._add("Mul", [wide, factors], node)
        whole = self._constant(f"{node.name}_whole", np.array(shape))
        self._add("Reshape", [scaled, whole], node, output=node.output[0])

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
        return _numpy_type(self._types[name].elem_type)


def _numpy_type(kind: int) -> np.dtype[Any]:
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    from onnx import helper

    return next((float(helper.get_attribute_value(a)) for a in node.attribute if a.name == name), default)


def _refuse_unheeded(node: onnx.NodeProto) -> None:
    if node.op_type not in MEANT:
        return
    attributes, inputs = MEANT[node.op_type]
    unheeded = sorted({attribute.name for attribute in node.attribute} - attributes)
    if unheeded or len(node.input) not in inputs or len(node.output) != 1:
        what = ", ".join(unheeded) or f"{len(node.input)} inputs and {len(node.output)} outputs"
        raise EngineError(
            f"node '{node.name}': no form for TensorRT 10.3 of {node.op_type} with {what}", WITHOUT_COMPAT
        )
