"""A stand-in for the part of TensorRT that runs engines, over a device in host memory (`host_device`).

An "engine" file names a bundle's graph, its cache rows and its profiles. Running it evaluates the network that the
real TensorRT parsed from that graph. The context refuses what TensorRT refuses, and what TensorRT leaves undefined
(buffers that overlap, a captured graph of another state) raises StandInError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from helpers.host_device import ALIGNMENT, GARBAGE, HostDevice, Shape, StandInError
from helpers.networks import RTX
from helpers.trt_surface import TRT_11_4, Package
from pixtral_engines.arrays import NUMPY_DTYPES
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import parse_graph
from pixtral_engines.parts import specs_of
from pixtral_engines.profiles import Profile, ranges
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.manifest import Bundle, open_bundle


def write_engine(
    path: Path, bundle: Bundle, name: str, rows: int, profiles: list[Profile], cuts: Sequence[int] = ()
) -> Path:
    """An engine file for the stand-in. `name` is that of a graph, or of a part."""
    inputs = specs_of(bundle, name.partition(".")[0], cuts)[name].inputs
    shapes = [{tensor.name: ranges(tensor, sizes) for tensor in inputs} for sizes in profiles]
    data = {"bundle": str(bundle.path), "name": name, "rows": rows, "profiles": shapes, "cuts": list(cuts)}
    path.write_text(json.dumps(data))
    return path


class StandIn(Package):
    """What `trt_session` uses of a recorded TensorRT package.

    `refusals` are messages by the method that refuses with them, `remark` is what it warns of at each engine.
    `compiled` counts kernels that no runtime cache had.
    """

    remark = ""

    def __init__(self, device: HostDevice, package: str = TRT_11_4, *, capturable: bool = True) -> None:
        super().__init__(package, {"Runtime": lambda logger: Runtime(self, logger)})
        self.device, self.capturable = device, capturable
        self.refusals: dict[str, str] = {}
        self.contexts: list[IExecutionContext] = []
        self.compiled = 0

    @property
    def compat(self) -> bool:
        """Whether it takes graphs in the form for TensorRT 10.3 only."""
        return "IKVCacheUpdateLayer" not in self._surface.classes

    def refuses(self, method: str, logger: Any) -> bool:
        if message := self.refusals.get(method):
            logger.log(RTX.ILogger.ERROR, message)
        return bool(message)

    def runs(self, graph: str) -> list[tuple[int, int]]:
        """Profile and runs of each context of a graph, as they were made."""
        return [(context.profiles[0], context.runs) for context in self.contexts if context.graph == graph]


class Runtime:
    def __init__(self, trt: StandIn, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, data: Any) -> ICudaEngine | None:
        text = bytes(data)
        if self._trt.refuses("deserialize_cuda_engine", self._logger):
            return None
        if not text.startswith(b"{"):
            self._logger.log(RTX.ILogger.ERROR, "the magic tag does not match")
            return None
        if self._trt.remark:
            self._logger.log(RTX.ILogger.WARNING, self._trt.remark)
        return ICudaEngine(self._trt, self._logger, text)


@lru_cache
def interpreter_of(
    path: str, name: str, rows: int, compat: bool, cuts: tuple[int, ...]
) -> tuple[Interpreter, dict[str, str]]:
    """An engine's interpreter, and the input that an output shares its memory with."""
    bundle, graph = open_bundle(Path(path)), name.partition(".")[0]
    part = specs_of(bundle, graph, cuts, compat=compat)[name]
    parsed = parse_graph(bundle, graph, RTX, rows, compat=compat, part=part, cuts=cuts)
    layers = [parsed.network.get_layer(n) for n in range(parsed.network.num_layers)]
    updates = [layer for layer in layers if RTX.ILayer.type.fget(layer).name == "KV_CACHE_UPDATE"]
    aliases = {layer.get_output(0).name: layer.get_input(0).name for layer in updates}
    return Interpreter(parsed.network, RTX, keep=parsed, cache_constants=True), aliases


class ICudaEngine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: StandIn, logger: Any, text: bytes) -> None:
        self.trt, self.logger = trt, logger
        data = json.loads(text)
        bundle, name, cuts = open_bundle(Path(data["bundle"])), data["name"], tuple(data["cuts"])
        self.spec = specs_of(bundle, name.partition(".")[0], cuts, compat=trt.compat)[name]
        self.patch = bundle.model.vision.token_edge
        self.interpreter, self.aliases = interpreter_of(data["bundle"], name, data["rows"], trt.compat, cuts)
        self._profiles = data["profiles"]
        self.inputs = {tensor.name: tensor for tensor in self.interpreter.inputs}
        self._tensors = self.inputs | {tensor.name: tensor for tensor in self.interpreter.outputs}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return RTX.TensorIOMode.INPUT if name in self.inputs else RTX.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self._tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> Shape:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        return [tuple(shape) for shape in self._profiles[profile][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.trt)

    def create_execution_context(self, config: Any) -> IExecutionContext | None:
        """With a runtime configuration, or with an allocation strategy alone."""
        if self.trt.refuses("create_execution_context", self.logger):
            return None
        settings = config if isinstance(config, IRuntimeConfig) else IRuntimeConfig(self.trt, config)
        assert settings.strategy == RTX.ExecutionContextAllocationStrategy.USER_MANAGED
        context = IExecutionContext(self, settings)
        self.trt.contexts.append(context)
        return context


class IRuntimeConfig:
    def __init__(self, trt: StandIn, strategy: Any = None) -> None:
        self._trt, self.strategy = trt, strategy
        self.cuda_graph_strategy = RTX.CudaGraphStrategy.DISABLED
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._trt)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IRuntimeCache:
    """Names of kernels in place of kernels."""

    def __init__(self, trt: StandIn) -> None:
        self._trt = trt
        self.kernels: set[str] = set()

    def deserialize(self, blob: Any) -> bool:
        magic, *kernels = bytes(blob).decode("utf-8", "replace").splitlines()
        if magic != f"kernels of {self._trt.__version__}":
            return False
        self.kernels = set(kernels)
        return True

    def serialize(self) -> bytes:
        return "\n".join([f"kernels of {self._trt.__version__}", *sorted(self.kernels)]).encode()


class IExecutionContext:
    """`profiles` has every profile switch, `runs` counts what was queued and not captured."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self.config, self.profiles, self.runs = config, list[int](), 0
        self.graph = engine.spec.name
        self._engine, self._device = engine, engine.trt.device
        self._profile, self._version = 0, 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._changed()
        self._scratch = (address, nbytes)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if stream != self._device.stream or not 0 <= profile < self._engine.num_optimization_profiles:
            return self._refuse(f"no profile {profile}, or another stream")
        self._changed()
        self.profiles.append(profile)
        self._profile, self._shapes = profile, {}
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(smallest) or any(
            not low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
        ):
            return self._refuse(f"{name} {shape} is outside profile {self._profile}: {smallest} to {largest}")
        self._changed()
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % ALIGNMENT:
            return self._refuse(f"{name} at {address:#x} is not aligned")
        self._changed()
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        self._letters()
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        letters = self._letters()
        if {"H", "W"} <= letters.keys():
            letters["P"] = letters["H"] * letters["W"] // self._engine.patch**2
        spec = {tensor.name: tensor.shape for tensor in (*self._engine.spec.inputs, *self._engine.spec.outputs)}
        return tuple(letters.get(n, -1) if isinstance(n, str) else n for n in spec[name])

    def execute_async_v3(self, stream: int) -> bool:
        if self._engine.trt.refuses("execute_async_v3", self._engine.logger):
            return False
        if self._device.is_recording and not self._engine.trt.capturable:
            return self._refuse("operation not permitted when stream is capturing")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        unset = [name for name in names if name not in self._addresses] + self.infer_shapes()
        if unset or stream != self._device.stream:
            return self._refuse(f"not set: {unset}, or another stream")
        views = {
            name: (
                self._addresses[name],
                self.get_tensor_shape(name),
                NUMPY_DTYPES[self._engine.get_tensor_dtype(name).name],
            )
            for name in names
        }
        self._check_memory(views)
        scratch = self._device.view(self._scratch[0], self._scratch[1:], np.dtype(np.uint8))
        version = self._version

        def check() -> None:
            if self._version != version:
                raise StandInError("a captured graph of a context that was changed since")

        self._compile(views)
        self.runs += not self._device.is_recording
        self._device.events.append(self._engine.spec.name)
        self._device.enqueue(lambda: self._run(views, scratch), check)
        return True

    def _run(self, views: Mapping[str, tuple[int, Shape, np.dtype[Any]]], scratch: Array) -> None:
        feeds = {name: self._device.view(*views[name]) for name in self._engine.inputs}
        scratch[:] = GARBAGE
        outputs = self._engine.interpreter.run(feeds)
        for name, value in outputs.items():
            np.copyto(self._device.view(*views[name]), value)

    def _compile(self, views: Mapping[str, tuple[int, Shape, np.dtype[Any]]]) -> None:
        kernel = f"{self.graph} {[views[name][1] for name in sorted(views)]}"
        cache = self.config.cache or IRuntimeCache(self._engine.trt)
        self._engine.trt.compiled += kernel not in cache.kernels
        cache.kernels.add(kernel)

    def _check_memory(self, views: Mapping[str, tuple[int, Shape, np.dtype[Any]]]) -> None:
        """Every tensor in memory of its own, but an aliased output in its input's."""
        for output, source in self._engine.aliases.items():
            if views[output] != views[source]:
                raise StandInError(f"{output} is updated in place, and is not bound where {source} is")
        address, nbytes = self._scratch
        if nbytes < self._engine.device_memory_size_v2:
            raise StandInError(f"{nbytes} bytes to compute in")
        spans = [(address, address + nbytes, "the scratch")]
        spans += [
            (address, address + int(np.prod(shape)) * dtype.itemsize, name)
            for name, (address, shape, dtype) in views.items()
            if name not in self._engine.aliases
        ]
        for (_, end, name), (start, _, other) in pairwise(sorted(spans)):
            if start < end:
                raise StandInError(f"{name} and {other} overlap")
        for view in views.values():
            self._device.view(*view)

    def _letters(self) -> dict[str, int]:
        """Sizes by dimension letter. Raises RuntimeError where inputs contradict each other, as TensorRT does."""
        letters: dict[str, int] = {}
        for tensor in self._engine.spec.inputs:
            for letter, n in zip(tensor.shape, self._shapes.get(tensor.name, ()), strict=False):
                if letters.setdefault(str(letter), n) != n:
                    raise RuntimeError(f"{tensor.name}: {letter} is {n} and {letters[str(letter)]}")
        return letters

    def _changed(self) -> None:
        self._version += 1

    def _refuse(self, message: str) -> bool:
        self._engine.logger.log(RTX.ILogger.ERROR, message)
        return False
