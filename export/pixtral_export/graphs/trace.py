"""Trace torch modules into ONNX pieces, which `builder` stamps into graphs.

A traced module holds no weights: its parameters are stride-0 tensors of the right shape,
and only their names and shapes reach the graph, as initializers that point into the bundle's weight file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from pixtral_export.model.ops import OPSET

Axes = dict[int, torch.export.Dim]


def without_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace each parameter of a module built on the meta device by a tensor that takes no memory.

    Each gets a value of its own, because the exporter merges small initializers that hold the same numbers.
    """
    for value, (name, parameter) in enumerate(list(module.named_parameters())):
        part, _, leaf = name.rpartition(".")
        hollow = torch.tensor(value, dtype=dtype).expand(parameter.shape)
        setattr(module.get_submodule(part), leaf, nn.Parameter(hollow, requires_grad=False))
    return module.eval()


def trace(module: nn.Module, inputs: Sequence[Tensor], axes: Sequence[Axes]) -> ir.Model:
    """Trace a module's forward pass; `axes` names the dynamic axes of each input."""
    inputs = [tensor.clone() for tensor in inputs]  # torch would merge two inputs that are one tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it exports
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, tuple(inputs), dynamo=True, opset_version=OPSET, dynamic_shapes=tuple(axes), verbose=False
        )
    assert program is not None
    graph = program.model.graph
    lost = {value.name for value in graph.inputs if not value.uses()}
    lost |= {name for name, _ in module.named_parameters()} - set(graph.initializers)
    if lost:
        raise RuntimeError(f"the trace of {type(module).__name__} lost {sorted(map(str, lost))}")
    return program.model
