"""Stamps traced pieces into one graph of the bundle, and dequantizes what the weight file holds as codes.

A tower of 40 equal blocks is traced as one block and stamped 40 times: seconds instead of minutes, and equal blocks
are equal by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from pixtral_export.model.ops import OPSET
from pixtral_export.weight_names import ExternalWeight, global_scale_name, scale_name
from pixtral_runtime.bundle.spec import GraphSpec

IR_VERSION = 11
INLINE_BYTES = 1024  # a traced constant larger than this would be a weight that escaped the weight file


class GraphBuilder:
    """Builds one graph of the bundle from traced pieces; `weights` maps initializer names to the weight file.

    A weight that the file holds as codes, with scales beside it, is dequantized where a MatMul or Gather reads it;
    `input_scales` names the scale of a MatMul's input where that is quantized too; `turned` names weights that are
    another one's transpose, which alone is in the file.
    """

    def __init__(
        self,
        spec: GraphSpec,
        weights: Mapping[str, ExternalWeight],
        input_scales: Mapping[str, str],
        location: str,
        turned: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._spec = spec
        names = {**turned} | {scale_name(one): scale_name(other) for one, other in turned.items()}
        self._turned = {one: other for one, other in names.items() if other in weights}
        self._weights = {**weights} | {
            one: replace(weights[other], name=one, shape=weights[other].shape[::-1])
            for one, other in self._turned.items()
        }
        self._input_scales = input_scales
        self._has_int8_products = any(weights[name].dtype == "int8" for name in input_scales)
        self._location = location
        self._nodes: list[ir.Node] = []
        self._made: dict[str, ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._wide: dict[tuple[ir.Value, str], ir.Value] = {}
        self._cached: dict[ir.Value, ir.Value] = {}  # dequantized cache tensors to the stored ones
        self._inputs = [_value(t.name, t.dtype, t.shape) for t in spec.inputs]

    def inputs(self, *names: str) -> list[ir.Value]:
        by_name = {value.name: value for value in self._inputs}
        return [by_name[name] for name in names]

    def weight(self, name: str) -> ir.Value:
        """An initializer whose bytes lie in the weight file, or one turned around."""
        if name in self._turned:
            if name not in self._made:
                source, shape = self.weight(self._turned[name]), self._weights[name]
                self._made[name] = _value(name, shape.dtype, shape.shape)
                self._add("Transpose", [source], f"{name}.turn", ir.AttrInt64s("perm", [1, 0]), output=self._made[name])
            return self._made[name]
        if name not in self._initializers:
            weight = self._weights[name]
            value = _value(name, weight.dtype, weight.shape)
            value.const_value = ir.ExternalTensor(
                self._location,
                weight.offset,
                weight.nbytes,
                _dtype(weight.dtype),
                shape=ir.Shape(weight.shape),
                name=name,
            )
            self._initializers[name] = value
        return self._initializers[name]

    def stamp(self, piece: ir.Model, prefix: str, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Add a copy of a piece's nodes, reading `inputs`; its parameters get the prefix. Returns its outputs."""
        graph = piece.graph
        values: dict[ir.Value, ir.Value] = dict(zip(graph.inputs, inputs, strict=True))
        for name, value in graph.initializers.items():
            values[value] = self._copy_initializer(prefix + name, value)
        for node in graph:
            outputs = [ir.Value(name=f"{prefix}{v.name}", type=v.type) for v in node.outputs]
            values.update(zip(node.outputs, outputs, strict=True))
            read = [None if v is None else values[v] for v in node.inputs]
            name = f"{prefix}{node.name}"
            if node.op_type == "MatMul" and self._is_quantized(read[1]):
                self._quantized_matmul(name, read[0], read[1], outputs[0])
            elif node.op_type == "Gather" and self._is_quantized(read[0]):
                self._quantized_gather(name, read[0], read[1], outputs[0])
            elif node.op_type == "TensorScatter" and self._is_quantized(read[0]):
                values[node.outputs[0]] = self._quantized_cache(name, read, outputs[0])
            else:
                attributes = list(node.attributes.values())
                self._nodes.append(ir.Node(node.domain, node.op_type, read, attributes, outputs=outputs, name=name))
        return [self._cached.get(values[value], values[value]) for value in graph.outputs]

    def _copy_initializer(self, name: str, value: ir.Value) -> ir.Value:
        if name in self._weights:
            return self.weight(name)
        constant = value.const_value
        if constant is None or constant.nbytes > INLINE_BYTES:
            raise RuntimeError(f"{name} is neither a small constant nor a tensor of the weight file")
        copy = ir.Value(
            name=name, type=value.type, shape=value.shape, const_value=ir.tensor(constant.numpy(), name=name)
        )
        return self._initializers.setdefault(name, copy)

    def _is_quantized(self, value: ir.Value | None) -> bool:
        return value is not None and scale_name(str(value.name)) in self._weights

    def _quantized_matmul(self, name: str, x: ir.Value | None, weight: ir.Value | None, y: ir.Value) -> None:
        """MatMul with a dequantized weight, its input through QuantizeLinear and DequantizeLinear where it has a scale.

        Quantized inputs are scaled in float32 whatever the activations' dtype: ONNX Runtime has its fast int8 kernels
        for float32 only, and scales of small activations would underflow in float16.
        """
        assert x is not None and weight is not None and weight.name is not None and y.dtype is not None
        matrix = self._dequantized(weight.name)
        if weight.name not in self._input_scales:
            self._add("MatMul", [x, matrix], name, output=y)
            return
        scale = self.weight(self._input_scales[weight.name])
        assert weight.dtype is not None
        if (x, str(scale.name)) not in self._wide:
            self._wide[x, str(scale.name)] = self._add(
                "Cast", [x], f"{scale.name}.wide", ir.AttrInt64("to", ir.DataType.FLOAT)
            )
        # A pair of its own for each product: ONNX Runtime computes products in int8 only where nothing else reads it.
        zero = self._zero_point(weight.dtype)
        codes = self._add("QuantizeLinear", [self._wide[x, str(scale.name)], scale, zero], f"{name}.quantize")
        rounded = self._add("DequantizeLinear", [codes, scale, zero], f"{name}.dequantize")
        product = self._add("MatMul", [rounded, matrix], name)
        self._add("Cast", [product], f"{name}.cast", ir.AttrInt64("to", y.dtype), output=y)

    def _quantized_gather(self, name: str, table: ir.Value | None, index: ir.Value | None, y: ir.Value) -> None:
        """Rows of a quantized table, gathered first: to dequantize first would do it for the whole table."""
        assert table is not None and index is not None and table.name is not None
        scales = self.weight(scale_name(table.name))
        rows = self._add("Gather", [table, index], name)
        scale_rows = self._add("Gather", [scales, index], f"{name}.scales")
        block = self._weights[table.name].shape[1] // self._weights[scale_name(table.name)].shape[1]
        attributes = (ir.AttrInt64("axis", -1), ir.AttrInt64("block_size", block))
        self._add("DequantizeLinear", [rows, scale_rows], f"{name}.dequantize", *attributes, output=y)

    def _quantized_cache(self, name: str, read: Sequence[ir.Value | None], y: ir.Value) -> ir.Value:
        """TensorScatter of rounded rows into a cache of codes. Returns the whole cache dequantized, for attention."""
        past, new, index = read
        assert past is not None and past.name is not None and past.dtype is not None and new is not None and index
        scale, zero = self.weight(scale_name(past.name)), self._zero_point(past.dtype)
        codes = self._add("QuantizeLinear", [new, scale, zero], f"{name}.quantize")
        axis, mode = ir.AttrInt64("axis", 2), ir.AttrString("mode", "linear")
        self._add("TensorScatter", [past, codes, index], name, axis, mode, output=y)
        wide = self._add("DequantizeLinear", [y, scale, zero], f"{name}.dequantize")
        self._cached[wide] = y
        return wide

    def _dequantized(self, name: str) -> ir.Value:
        codes, scales = self.weight(name), self.weight(scale_name(name))
        shape, scale_shape = self._weights[name].shape, self._weights[scale_name(name)].shape
        zeros = [self._zeros(name)] if self._has_int8_products and name not in self._input_scales else []
        if len(scale_shape) == 1:
            axis = ir.AttrInt64("axis", 1)
            return self._add("DequantizeLinear", [codes, scales, *zeros], f"{name}.dequantize", axis)
        block = shape[0] // scale_shape[0]
        if global_scale_name(name) in self._weights:
            unit = self.weight(global_scale_name(name))
            scales = self._add("DequantizeLinear", [scales, unit], f"{scales.name}.dequantize")
        attributes = (ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", block))
        return self._add("DequantizeLinear", [codes, scales, *zeros], f"{name}.dequantize", *attributes)

    def _zeros(self, name: str) -> ir.Value:
        """Zero points of int8 weights that no product of int8 reads, made by a node: the file need not hold them.

        Where ONNX Runtime turns int8 weights into uint8 (`x64quantprecision`), it moves the zero points that are there;
        without any it makes a single one, which does not fit scales of columns or blocks.
        """
        shape = np.array(self._weights[scale_name(name)].shape, np.int64)
        sizes = ir.Value(name=f"{name}_zero_shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape.shape))
        sizes.const_value = ir.tensor(shape, name=sizes.name)
        self._initializers[f"{name}_zero_shape"] = sizes
        value = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.int8)))
        return self._add("ConstantOfShape", [sizes], f"{name}_zero", value)

    def _zero_point(self, dtype: ir.DataType) -> ir.Value:
        """The zero of a type, which tells QuantizeLinear its output type."""
        name = f"zero_{dtype.name.lower()}"
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))
        value.const_value = ir.tensor(np.zeros([], dtype.numpy()), dtype=dtype, name=name)
        return self._initializers.setdefault(name, value)

    def _add(
        self, op: str, inputs: Sequence[ir.Value], name: str, *attributes: ir.Attr, output: ir.Value | None = None
    ) -> ir.Value:
        value = ir.Value(name=f"{name}_output") if output is None else output
        self._nodes.append(ir.Node("", op, inputs, attributes, outputs=[value], name=name))
        return value

    def finish(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """Name the outputs as the spec does and close the graph."""
        for value, tensor in zip(outputs, self._spec.outputs, strict=True):
            value.name = tensor.name
            value.dtype, value.shape = _dtype(tensor.dtype), ir.Shape(tensor.shape)
        graph = ir.Graph(
            self._inputs,
            list(outputs),
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self._spec.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pixtral")


def _dtype(name: str) -> ir.DataType:
    return ir.DataType[{"float32": "FLOAT"}.get(name, name.upper())]


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(_dtype(dtype)), shape=ir.Shape(shape))
