"""Evaluate a parsed TensorRT network in NumPy, layer by layer: what TensorRT understood, without a GPU.

Everything is read from the network's own layers and weights, never from the ONNX file they came from. Floats are
computed in float32 and rounded to the type the network declares for a tensor; an attention is rounded once, at its
end. What each layer means stands in `layers`; this file puts them in order and moves tensors between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from pixtral_engines.arrays import NUMPY_DTYPES
from pixtral_engines.attention_semantics import attention, in_float16
from pixtral_engines.layer_semantics import LAYERS
from pixtral_engines.tensors import Evaluate, Tensor, UnknownLayer
from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import InputError

Observe = Callable[[str, str, Array], None]
"""Called with the layer's name, the tensor's name and the tensor, for every tensor a layer makes."""


@dataclass(frozen=True)
class _Step:
    """A layer in the form of its own class. `inputs` are tensor names, None where an optional one is left out."""

    layer: Any
    evaluate: Evaluate
    inputs: tuple[str | None, ...]
    outputs: tuple[Tensor, ...]


class Interpreter:
    """Runs a network on the host.

    `keep` is held as long as the interpreter: the network's weights are in memory that its parser owns.
    `cache_constants` keeps what layers without a run-time input compute, such as dequantized weights. With
    `float16_attention` attention adds up in float16, as kernels may.
    """

    def __init__(
        self,
        network: Any,
        trt: ModuleType,
        *,
        keep: object = None,
        cache_constants: bool = False,
        float16_attention: bool = False,
    ) -> None:
        self._network, self._keep, self._cache_constants = network, keep, cache_constants
        self.inputs = [Tensor.of(network.get_input(n)) for n in range(network.num_inputs)]
        self.outputs = [Tensor.of(network.get_output(n)) for n in range(network.num_outputs)]
        self._steps = _in_order([_step(network.get_layer(n), trt) for n in range(network.num_layers)])
        if float16_attention:
            rounded: dict[Evaluate, Evaluate] = {attention: partial(attention, product=in_float16)}
            self._steps = [replace(step, evaluate=rounded.get(step.evaluate, step.evaluate)) for step in self._steps]
        self._constant: set[str] = set()
        self._last_use: dict[str, int] = {}
        self._constants: dict[str, Array] = {}
        for place, step in enumerate(self._steps):
            names = [tensor.name for tensor in step.outputs]
            if self._constant.issuperset(filter(None, step.inputs)):
                self._constant.update(names)
            self._last_use.update(dict.fromkeys([*filter(None, step.inputs), *names], place))

    def run(self, feeds: Mapping[str, Array], observe: Observe | None = None) -> dict[str, Array]:
        """Named inputs to named outputs. Raises InputError where inputs are not those that the network declares."""
        expected = {tensor.name for tensor in self.inputs}
        if expected != set(feeds):
            raise InputError(f"the network takes {sorted(expected)}, not {sorted(feeds)}", "feed each of them once")
        for tensor in self.inputs:
            if refusal := tensor.refusal(feeds[tensor.name]):
                raise InputError(refusal, "feed what the network declares")
        values: dict[str | None, Any] = {None: None}
        values.update(feeds)
        values.update(self._constants)
        kept = {tensor.name for tensor in self.outputs}
        with np.errstate(all="ignore"):  # an overflow is a result: `observe` sees the infinity
            for place, step in enumerate(self._steps):
                if step.outputs[0].name not in values:
                    self._evaluate(step, values)
                if observe is not None:
                    for tensor in step.outputs:
                        observe(step.layer.name, tensor.name, values[tensor.name])
                for name in {*step.inputs, *(tensor.name for tensor in step.outputs)} - kept - {None}:
                    if self._last_use[str(name)] == place:
                        del values[name]
        return {tensor.name: values[tensor.name] for tensor in self.outputs}

    def _evaluate(self, step: _Step, values: dict[str | None, Any]) -> None:
        made = step.evaluate(step.layer, [values[name] for name in step.inputs], step.outputs[0])
        for tensor, one in zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            value = np.asarray(one).astype(NUMPY_DTYPES[tensor.dtype], copy=False)
            if refusal := tensor.refusal(value):
                raise RuntimeError(f"layer '{step.layer.name}': {refusal}")
            values[tensor.name] = value
            if self._cache_constants and tensor.name in self._constant:
                self._constants[tensor.name] = value


def _step(layer: Any, trt: ModuleType) -> _Step:
    kind = trt.ILayer.type.fget(layer).name
    if kind not in LAYERS:
        raise UnknownLayer(layer, f"the type {kind}")
    class_name, evaluate = LAYERS[kind]
    layer.__class__ = getattr(trt, class_name)  # get_layer returns the base class
    inputs = [layer.get_input(n) for n in range(layer.num_inputs)]
    outputs = [layer.get_output(n) for n in range(layer.num_outputs)]
    return _Step(
        layer,
        evaluate,
        tuple(None if tensor is None else tensor.name for tensor in inputs),
        tuple(map(Tensor.of, outputs)),
    )


def _in_order(steps: list[_Step]) -> list[_Step]:
    """The network's own order, except that a layer follows those it reads: the importer does not keep to that."""
    made_by = {tensor.name: step for step in steps for tensor in step.outputs}
    if len(made_by) < sum(len(step.outputs) for step in steps):
        raise RuntimeError("two tensors of the network share a name")
    ordered: dict[int, _Step] = {}

    def visit(step: _Step) -> None:
        if id(step) not in ordered:
            for name in step.inputs:
                if name in made_by:
                    visit(made_by[name])
            ordered[id(step)] = step

    for step in steps:
        visit(step)
    return list(ordered.values())
