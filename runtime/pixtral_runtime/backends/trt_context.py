"""Execution contexts of a TensorRT engine: each stays in one profile, and has a CUDA graph of the run that it repeats.

TensorRT records what a context is set to, so a graph is lost where another shape or buffer is bound. Prompts and decode
steps of each number of slots therefore have contexts of their own. All of them work in one memory, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.backends.device_buffers import Shape
from pixtral_runtime.backends.session import GraphUse
from pixtral_runtime.backends.trt_package import TensorRTLog
from pixtral_runtime.errors import MachineError

LEAST_SCRATCH_BYTES = 256  # an engine may need none, and a device gives no address for nothing


class Scratch:
    """Memory that contexts of one stream compute in, as much as the largest of them needs; taken when first used."""

    def __init__(self, device: DeviceStream) -> None:
        self._device, self._nbytes = device, LEAST_SCRATCH_BYTES
        self._memory: Memory | None = None

    def reserve(self, nbytes: int) -> None:
        self._nbytes = max(self._nbytes, nbytes)

    def memory(self) -> Memory:
        if self._memory is None or self._memory.nbytes < self._nbytes:
            self._memory = Memory(self._device, self._nbytes)
        return self._memory


@dataclass(frozen=True)
class _Bound:
    """What an execution context is set to. Where something is empty, it has to be set before the next run."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of inputs
    output_shapes: Mapping[str, Shape] = field(default_factory=dict)
    addresses: Mapping[str, int] = field(default_factory=dict)  # of inputs and outputs
    scratch: int = 0  # an address
    captured: Any = None  # a CUDA graph of a run over exactly this


class TrtContext:
    """TensorRT's `context` in one profile. `graph` is the bundle's name for what the engine computes."""

    def __init__(
        self, context: Any, profile: int, graph: str, device: DeviceStream, scratch: Scratch, log: TensorRTLog
    ) -> None:
        self._context, self._graph, self._device, self._scratch, self._log = context, graph, device, scratch, log
        self._bound = _Bound()
        self._do("set_optimization_profile_async", profile, device.stream)

    def bind_shapes(self, shapes: Mapping[str, Shape], outputs: Mapping[str, Any]) -> Mapping[str, Shape]:
        """Set the inputs' shapes. Returns those of the outputs, which are named."""
        if shapes != self._bound.shapes:
            self._note(_Bound())
            for name, shape in shapes.items():
                self._do("set_input_shape", name, shape)
            if unset := self._context.infer_shapes():
                raise RuntimeError(f"TensorRT lacks the shapes of {unset}")
            output_shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in outputs}
            self._note(_Bound(shapes, output_shapes))
        return self._bound.output_shapes

    def run(self, addresses: Mapping[str, int], use: GraphUse) -> None:
        """Queue a run over these addresses. A repetition is captured: the run before it was the warm-up that
        TensorRT asks for."""
        is_repeated = self._bind_memory(addresses)
        if use.kind == "captured" and is_repeated and self._bound.captured is None and not use.refused:
            self._capture(use)
        if self._bound.captured is not None:
            self._device.launch(self._bound.captured)
            use.replayed += 1
        else:
            self._execute()
            use.plain += 1

    def _bind_memory(self, addresses: Mapping[str, int]) -> bool:
        """Bind every tensor, and the scratch. Returns whether all was bound so already."""
        scratch = self._scratch.memory()
        if (addresses, scratch.address) == (self._bound.addresses, self._bound.scratch):
            return True
        self._note(replace(self._bound, addresses={}, captured=None))
        self._context.set_device_memory(scratch.address, scratch.nbytes)
        for name, address in addresses.items():
            self._do("set_tensor_address", name, address)
        self._note(replace(self._bound, addresses=addresses, scratch=scratch.address))
        return False

    def _note(self, bound: _Bound) -> None:
        """Remember what is bound from now on. A graph that was captured of something else is released."""
        if self._bound.captured is not None and self._bound.captured is not bound.captured:
            self._device.release(self._bound.captured)
        self._bound = bound

    def _capture(self, use: GraphUse) -> None:
        """Record a run. Where that is refused or fails, it is said once, and runs are plain from then on."""
        try:
            self._device.begin_capture()
            try:
                self._execute()
            except BaseException:  # what was recorded is worth nothing, but the stream has to run again
                with suppress(MachineError):
                    self._device.end_capture()
                raise
            recorded = self._device.end_capture()
        except MachineError as error:
            use.refused = f"a capture failed: {error}"
            return
        use.graphs += 1
        self._note(replace(self._bound, captured=recorded))

    def _execute(self) -> None:
        """Queue a run. Raises MachineError where the device cannot."""
        before = len(self._log.errors)
        if not self._context.execute_async_v3(self._device.stream):
            raise self._log.failure(f"run the {self._graph} engine", before, "pixtral doctor")

    def _do(self, method: str, *arguments: Any) -> None:
        """A call of the context that says False where it refuses. All that feeds can cause was ruled out before."""
        before = len(self._log.errors)
        if not getattr(self._context, method)(*arguments):
            complaint = self._log.complaint(before)
            raise RuntimeError(f"TensorRT refuses {method}{arguments} of {self._graph}: {complaint}")
