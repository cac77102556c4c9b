"""Small ONNX models for tests, in ONNX Runtime and as TensorRT understands them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import ParsedNetwork, parse_model
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import import_tensorrt

RTX = import_tensorrt("rtx")


def make_model(
    nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, Array], outputs: Sequence[str], **constants: Array
) -> onnx.ModelProto:
    """A model that takes arrays like the feeds."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def parse(model: onnx.ModelProto, path: Path = Path("model.onnx")) -> ParsedNetwork:
    return parse_model(model, path, RTX)


def interpret(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs as TensorRT understands the model, dropped inputs or not."""
    parsed = parse(model)
    return Interpreter(parsed.network, RTX, keep=parsed).run(feeds)


def run_in_onnx_runtime(model: bytes | Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of the graph as it stands, nothing fused: fused int4 products round their activations to int8."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs: list[Any] = session.run(None, dict(feeds))
    return dict(zip(names, outputs, strict=True))
