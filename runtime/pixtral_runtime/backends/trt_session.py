"""The Session protocol over a TensorRT engine, of `tensorrt` or of `tensorrt_rtx`: the caller hands in the module.

All sessions of a bundle share one `DeviceStream`, so a graph's output is the next one's input where it lies and nothing
waits but `DeviceBuffer.numpy`. Device memory is taken once, as much as the engine's largest shapes need:
per input that is fed from the host, per output, and for the cache.

The cache has as many rows as the engine was built for. Where the engine says that a present tensor is its past tensor
(`get_aliased_input_tensor`: TensorRT's cache operator), both are one buffer. Elsewhere, an int8 cache, TensorRT
promises nothing of the kind: present tensors get memory of their own and are copied back after the step, on the device.

Not yet run on a device: tests run it over a stand-in for the engine that evaluates TensorRT's own parsed network.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixtral_runtime.backends.candidates import PICKED, with_candidates
from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.backends.device_buffers import DeviceBuffer, DeviceCache, Shape
from pixtral_runtime.backends.session import Array, Buffer, GraphUse, KVCache, own_cache
from pixtral_runtime.backends.trt_context import Scratch, TrtContext
from pixtral_runtime.backends.trt_kernel_cache import compiles_kernels, keep_kernels
from pixtral_runtime.backends.trt_package import log_of
from pixtral_runtime.bundle.decoder_parts import engine_specs
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import CachePairs, TensorSpec
from pixtral_runtime.errors import EngineError, InputError, StaleEngineError

TENSORRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT64": "int64"}
"""The names that a bundle gives TensorRT's types."""


@dataclass(frozen=True)
class TrtSettings:
    """`cuda_graphs`: record a step whose shapes and buffers recur as a CUDA graph, and replay it."""

    cuda_graphs: bool = False


@dataclass(frozen=True)
class _Profile:
    """Smallest, usual and largest shape of each input."""

    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    def misfits(self, shapes: Mapping[str, Shape]) -> list[str]:
        return [name for name, shape in shapes.items() if not _within(shape, *self.ranges[name][::2])]

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far the sizes are from the usual ones, the ones that TensorRT picked kernels for."""
        usual = sum(math.prod(self.ranges[name][1]) for name in shapes)
        return abs(math.log(sum(map(math.prod, shapes.values())) / usual))


class TrtSession:
    """One engine of a bundle.

    `path` is the engine's file, `kernels` the one where TensorRT-RTX keeps what it compiles; all sessions of the bundle
    share `device`, and `scratch` to compute in. `name` is the graph's, or with `cuts` that of a part (`decoder_parts`).
    Raises EngineError where the engine is not one of the bundle's graph,
    MachineError where TensorRT cannot load it here.
    """

    def __init__(
        self,
        trt: ModuleType,
        path: Path,
        bundle: Bundle,
        name: str,
        device: DeviceStream,
        settings: TrtSettings = TrtSettings(),
        scratch: Scratch | None = None,
        kernels: Path | None = None,
        cuts: Sequence[int] = (),
    ) -> None:
        self._graph, self._device = name, device
        self._trt, self._scratch = trt, scratch or Scratch(device)
        self._log = log_of(trt)
        self._bundle_path = bundle.path
        self._rebuild = f"pixtral build {bundle.path}"
        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._load(path)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.picks = PICKED in names
        graph = name.partition(".")[0]
        whole = with_candidates(bundle, graph) if self.picks else bundle.graph_spec(graph)
        self.spec = engine_specs(whole, cuts)[name]
        self._inputs, self._outputs = (
            {tensor.name: tensor for tensor in tensors} for tensors in (self.spec.inputs, self.spec.outputs)
        )
        self._refuse_other_graph(trt, path, names)
        self._profiles = [self._profile(index) for index in range(self._engine.num_optimization_profiles)]
        alias = getattr(self._engine, "get_aliased_input_tensor", lambda _: None)  # from TensorRT 10.15 on
        self._aliases = {name: alias(name) for name in self._outputs}
        has_own_graphs = hasattr(trt, "CudaGraphStrategy")
        self.graph_use = GraphUse("off" if not settings.cuda_graphs else "built-in" if has_own_graphs else "captured")
        self._scratch.reserve(self._engine.device_memory_size_v2)
        self._context_settings = self._settings_of_contexts(kernels)
        self._contexts: dict[tuple[int, int], TrtContext] = {}
        self._capacity = self._largest_outputs()
        self._fed: dict[str, Memory] = {}
        self._pools: dict[str, list[Memory]] = {name: [] for name in self._outputs}

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Queue one run. Raises InputError for feeds that no profile takes and for a cache not the engine's."""
        past = own_cache(self.spec, cache, DeviceCache)
        values = {name: v if isinstance(v, np.ndarray | DeviceBuffer) else v.numpy() for name, v in feeds.items()}
        shapes: dict[str, Shape] = {name: value.shape for name, value in values.items()}
        pasts = past.by_name() if past else {}
        shapes |= dict.fromkeys(pasts, past.shape) if past else {}
        self._refuse_wrong_feeds({name: value.dtype for name, value in values.items()}, shapes)
        context = self._context(self._profile_for(shapes, fed=values), shapes)
        output_shapes = context.bind_shapes(shapes, self._outputs)
        outputs = {
            name: self._output(name, output_shapes[name]) for name, alias in self._aliases.items() if alias is None
        }
        addresses = {name: self._feed(name, value) for name, value in values.items()}
        addresses |= pasts
        addresses |= {name: addresses[alias] for name, alias in self._aliases.items() if alias is not None}
        addresses |= {name: buffer.address for name, buffer in outputs.items()}
        context.run(addresses, self.graph_use)
        for read, written in self.spec.caches:
            if present := outputs.pop(written.name, None):
                self._device.copy_within(addresses[read.name], present.address, present.nbytes)
        return dict(outputs)

    def upload(self, name: str, value: Array) -> DeviceBuffer:
        """A tensor from the host, for several engines that take it. It stays until the next one of its name."""
        self._feed(name, value)
        return DeviceBuffer(self._device, [], self._fed[name], value.shape, value.dtype)

    def new_cache(self, slots: int, rows: int, tensors: CachePairs = ()) -> DeviceCache:
        """A zeroed cache, of its own tensors or of several engines'. Raises InputError where it exceeds theirs."""
        tensors = tensors or self.spec.caches
        first, _ = tensors[0]
        most, *rest = max(profile.ranges[first.name][2] for profile in self._profiles)
        if slots > most:
            remedy = f"pixtral build {self._bundle_path} --batch {slots}"
            raise EngineError(f"{slots} slots are needed, the engine has {most}", remedy)
        rebuild = f"pixtral build {self._bundle_path} --context"
        cache = DeviceCache(self._device, tensors, (slots, *rest), _dtype(first), most=rest[1], rebuild=rebuild)
        cache.reserve(rows)
        return cache

    # Loading

    def _load(self, path: Path) -> Any:
        """The engine from its file, mapped: pages are dropped again as TensorRT moves weights to the device."""
        before = len(self._log.errors)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = self._runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read: {error}", self._rebuild) from error
        if engine is None:
            raise self._log.failure(f"load {path}", before, f"{self._rebuild}, or pixtral doctor")
        return engine

    def _refuse_other_graph(self, trt: ModuleType, path: Path, names: Sequence[str]) -> None:
        seen = {name: TENSORRT_DTYPES.get(kind := self._engine.get_tensor_dtype(name).name, kind) for name in names}
        expected = {name: tensor.dtype for name, tensor in (self._inputs | self._outputs).items()}
        fed = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        if seen != expected or fed != set(self._inputs):
            odd = sorted(set(seen.items()) ^ set(expected.items()))
            raise StaleEngineError(
                f"{path} is not this bundle's {self._graph} engine: they differ in {odd}", self._rebuild
            )

    def _profile(self, index: int) -> _Profile:
        def shapes(name: str) -> tuple[Shape, Shape, Shape]:
            smallest, usual, largest = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, index))
            return smallest, usual, largest

        return _Profile({name: shapes(name) for name in self._inputs})

    def _context(self, profile: int, shapes: Mapping[str, Shape]) -> TrtContext:
        """The context of a run: one for each number of slots that decode a token, another for all else of a profile."""
        sizes: dict[str | int, int] = {}
        for name, shape in shapes.items():
            sizes |= zip(self._inputs[name].shape, shape, strict=True)
        key = (profile, sizes["B"] if sizes.get("T") == 1 and self.graph_use.kind == "captured" else 0)
        if key not in self._contexts:
            made = self._create_context()
            self._contexts[key] = TrtContext(made, profile, self._graph, self._device, self._scratch, self._log)
        return self._contexts[key]

    def _settings_of_contexts(self, kernels: Path | None) -> Any:
        """What contexts are created with: a strategy, and for TensorRT-RTX a configuration that has it."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not compiles_kernels(self._trt):
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self.graph_use.kind == "built-in":
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if kernels is not None:
            keep_kernels(self, config, kernels)
        return config

    def _create_context(self) -> Any:
        before = len(self._log.errors)
        context = self._engine.create_execution_context(self._context_settings)
        if context is None:
            smaller = f"pixtral build {self._bundle_path} with a smaller --context, --batch or --chunk"
            raise self._log.failure(f"prepare the {self._graph} engine", before, smaller)
        return context

    def _largest_outputs(self) -> dict[str, int]:
        """Bytes of each output at the largest shapes of any profile."""
        sizes = dict.fromkeys(self._outputs, 0)
        for index, profile in enumerate(self._profiles):
            largest = {name: shapes[2] for name, shapes in profile.ranges.items()}
            for name, shape in self._context(index, largest).bind_shapes(largest, self._outputs).items():
                sizes[name] = max(sizes[name], math.prod(shape) * _dtype(self._outputs[name]).itemsize)
        return sizes

    # Running

    def _refuse_wrong_feeds(self, dtypes: Mapping[str, np.dtype[Any]], shapes: Mapping[str, Shape]) -> None:
        if set(shapes) != set(self._inputs):
            odd = sorted(set(shapes) ^ set(self._inputs))
            raise InputError(f"{self._graph} takes {', '.join(self._inputs)}; missing or unknown: {', '.join(odd)}")
        for name, dtype in dtypes.items():
            if dtype != _dtype(self._inputs[name]):
                raise InputError(f"{self._graph}: {name} is {dtype}, expected {self._inputs[name].dtype}")

    def _profile_for(self, shapes: Mapping[str, Shape], fed: Iterable[str]) -> int:
        """The profile that takes the shapes and was tuned for the most similar ones of what is fed: not the cache."""
        misfits = [profile.misfits(shapes) for profile in self._profiles]
        fitting = [index for index, names in enumerate(misfits) if not names]
        if fitting:
            compared = {name: shapes[name] for name in fed}
            return min(fitting, key=lambda index: self._profiles[index].distance(compared))
        name = min(misfits, key=len)[0]
        ranges = (profile.ranges[name] for profile in self._profiles)
        taken = ", or ".join(f"{smallest} to {largest}" for smallest, _, largest in ranges)
        raise EngineError(
            f"{self._graph}: {name} is {shapes[name]}, the engine takes {taken}",
            f"pixtral build {self._bundle_path} with a larger --batch or vision --profile"
            if self._graph == "vision"
            else f"pixtral build {self._bundle_path} with a larger --batch or --chunk",
        )

    def _feed(self, name: str, value: Array | DeviceBuffer) -> int:
        if isinstance(value, DeviceBuffer):
            return value.address
        if name not in self._fed:
            largest = max(math.prod(profile.ranges[name][2]) for profile in self._profiles)
            self._fed[name] = Memory(self._device, largest * value.itemsize)
        self._device.copy_to_device(self._fed[name].address, np.ascontiguousarray(value))
        return self._fed[name].address

    def _output(self, name: str, shape: Shape) -> DeviceBuffer:
        pool = self._pools[name]
        memory = pool.pop() if pool else Memory(self._device, self._capacity[name])
        return DeviceBuffer(self._device, pool, memory, shape, _dtype(self._outputs[name]))


def _within(shape: Shape, smallest: Shape, largest: Shape) -> bool:
    return len(shape) == len(smallest) and all(
        low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
    )


def _dtype(tensor: TensorSpec) -> np.dtype[Any]:
    if tensor.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 - makes NumPy know the name
    return np.dtype(tensor.dtype)
