"""Faults of the CUDA backend on purpose: a tool that does not find these finds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
from onnx import TensorProto, helper

from cuda_standin.records import COPIED_CACHE, CPU_NODE, HOST_COPY
from pixtral_runtime.backends.ort_cuda import OrtCudaSession
from pixtral_runtime.backends.ort_cuda_lowering import Lowered, lowered
from pixtral_runtime.generation.logits import Logits


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Sessions that are opened and run in here have the fault. Masked attention is `CudaSettings.by_length`."""
    if fault == HOST_COPY:
        with mock.patch.object(Logits, "__init__", _fetch_all(Logits.__init__)):
            yield
    elif fault == CPU_NODE:
        with mock.patch("pixtral_runtime.backends.ort_cuda.lowered", _lowered_with_cpu_node):
            yield
    elif fault == COPIED_CACHE:
        with mock.patch.object(OrtCudaSession, "_bind", _bind_apart(OrtCudaSession._bind)):
            yield
    else:
        yield


def _fetch_all(make: Any) -> Any:
    """Logits that are copied to the host whole, at each step."""

    def init(self: Logits, *buffers: Any) -> None:
        make(self, *buffers)
        self.numpy()

    return init


def _lowered_with_cpu_node(path: Path, *arguments: Any, **settings: Any) -> Lowered:
    """A decoder in which `write_index` goes through Asinh, of which CUDA has no kernel."""
    made = lowered(path, *arguments, **settings)
    model = onnx.load_from_string(made.graph)
    if any(value.name == "write_index" for value in model.graph.input):
        for node in model.graph.node:
            node.input[:] = ["planted" if name == "write_index" else name for name in node.input]
        added = [
            helper.make_node("Cast", ["write_index"], ["planted_float"], to=TensorProto.FLOAT),
            helper.make_node("Asinh", ["planted_float"], ["planted_result"]),
            helper.make_node("Cast", ["planted_result"], ["planted"], to=TensorProto.INT64),
        ]
        nodes = added + list(helper.make_graph(model.graph.node, "copy", [], []).node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return made._replace(graph=model.SerializeToString())


def _bind_apart(bind: Any) -> Any:
    """A cache that is written elsewhere than it is read."""

    def bind_outputs(self: OrtCudaSession, *arguments: Any) -> Any:
        binding = bind(self, *arguments)
        for _, present in self._spec.caches:
            binding.bind_output(present.name, "cuda")
        return binding

    return bind_outputs
