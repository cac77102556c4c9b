"""The Session protocol over ONNX Runtime's CUDA provider.

All sessions of a bundle and the copies between them are queued on one stream of one `DeviceStream`: a graph's output is
the next one's input where it lies, and nothing waits but `DeviceBuffer.numpy`. The graphs are rewritten first
(`ort_cuda_lowering`). A step that decodes one token a slot launches some 740 kernels, which takes the host longer than
the device; where such a step recurs over the same memory it is recorded as a CUDA graph and replayed.

Every input and output has memory of ours. ONNX Runtime's own holds what is between them, and a graph that is replayed
writes there: an output left in it would be overwritten.

It ran on an H200 (docs/measurements.md). Tests run it with host memory as the device, which is all but the CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixtral_runtime.backends.candidates import with_candidates
from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.backends.device_buffers import DeviceBuffer, DeviceCache, Shape, whole_rows
from pixtral_runtime.backends.ort_cuda_lowering import lowered
from pixtral_runtime.backends.ort_session import open_graph, ort_errors, refuse_missing_kernels, refuse_other_graph
from pixtral_runtime.backends.session import Array, Buffer, GraphUse, KVCache, Sessions, own_cache
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import CUDA_CHUNK_TOKENS, GRAPHS, GraphSpec, TensorSpec
from pixtral_runtime.errors import MachineError, Option, PixtralError, extra_missing

if TYPE_CHECKING:
    import onnxruntime as ort

CUDNN = "libcudnn.so.9"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
BATCHED_KERNELS = "ORT_FPA_INTB_GEMM"  # ONNX Runtime's variable for kernels that serve many slots
BLOCK_OF_BATCHED_KERNELS = 32  # rows that share a scale: the only size for which it has them
WITH_BATCHED_KERNELS = {
    "ep.cuda.fpa_intb_gemm": "1",
    # Which kernel is best is tried for so many tokens when a session is made, and for others when they come.
    "ep.cuda.fpa_intb_profile_m": "1,2,4,8,16,32",
    # They have weights of their own: those that were read are given back one by one.
    "session.use_device_allocator_for_initializers": "1",
}
SMALL_FEEDS_BYTES = 256 << 10  # of a run that travel together
ALIGNMENT = 256  # bytes, of every tensor
MOST_CUDA_GRAPHS = 64  # a session never forgets one
REPEATS_BEFORE_GRAPH = 2  # runs of a step before it is recorded
NO_CAPTURE = "cannot use the graph capture"  # ONNX Runtime's words where a node runs elsewhere
WIDENED = ("int8", "fp8")  # recipes whose weights CUDA would turn to float32 at every token
NO_GRAPH = "-1"  # ONNX Runtime's number for a run that is neither recorded nor replayed


@dataclass(frozen=True)
class CudaSettings:
    """`device` is the GPU's index. The last two are off only to measure what they bring.

    `many_slots`: products by int4 get kernels that are made for many slots. On an H200 a step of the 12B takes half
    the time with 16 slots and 1.2 times it with one, a prompt 1.5 times it. ORT_FPA_INTB_GEMM=0 or 1 decides instead.

    `cuda_graphs`: replay steps that recur.
    `by_length`: attention by key length instead of the portable graph's mask.
    """

    device: int = 0
    many_slots: bool = False
    cuda_graphs: bool = True
    by_length: bool = True


class _Tensor(NamedTuple):
    """An input or output, other than the cache's, and the memory it is bound to."""

    name: str
    address: int
    shape: Shape
    dtype: np.dtype[Any]


@dataclass
class _Step:
    """A run over certain memory: what is bound, how often it ran, and the number of its CUDA graph."""

    binding: ort.IOBinding
    runs: int = 0
    graph: str = NO_GRAPH


class OrtCudaSession:
    """One graph of a bundle on a CUDA device. Raises MachineError where ONNX Runtime cannot run it there.

    `place` is "cuda", or "cpu" for a device in host memory.
    """

    def __init__(
        self, bundle: Bundle, graph: str, device: DeviceStream, settings: CudaSettings, place: str = "cuda"
    ) -> None:
        refuse_missing_kernels(bundle)
        refuse_wide_products(bundle)
        self._bundle, self._device, self._place, self._settings = bundle, device, place, settings
        self._spec = with_candidates(bundle, graph)
        self._path = bundle.graph_path(graph)
        self.graph_use = GraphUse("captured" if settings.cuda_graphs and graph != "vision" else "off")
        self._rows_first = False
        self._session = self._open()
        if self._rows_first:
            self._spec = with_rows_first(self._spec)
        refuse_other_graph(self._session, bundle, self._spec)
        pasts, presents = ({pair[end] for pair in self._spec.caches} for end in (0, 1))
        self._inputs = {tensor.name: tensor for tensor in self._spec.inputs if tensor not in pasts}
        self._outputs = [tensor for tensor in self._spec.outputs if tensor not in presents]
        self._fed: dict[str, Memory] = {}
        self._small = Memory(device, SMALL_FEEDS_BYTES)
        self._pools: dict[str, list[Memory]] = {tensor.name: [] for tensor in self._outputs}
        self._steps: dict[tuple[Any, ...], _Step] = {}  # those that may recur
        self._options: dict[str, ort.RunOptions] = {}

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Queue one run. Raises InputError for a cache that is not its own, or none where it needs one."""
        past = own_cache(self._spec, cache, DeviceCache)
        inputs = self._feed(feeds)
        sizes = self._sizes(inputs)
        outputs = {tensor.name: self._output(tensor, sizes) for tensor in self._outputs}
        bound = [*inputs, *(_Tensor(name, one.address, one.shape, one.dtype) for name, one in outputs.items())]
        step = self._step(tuple(bound), past, may_recur=sizes.get("T") == 1)
        with ort_errors(self._path, "cannot be computed"):
            self._session.run_with_iobinding(step.binding, self._run_options(step.graph))
        return dict(outputs)

    def new_cache(self, slots: int, rows: int) -> DeviceCache:
        decoder, most = self._bundle.model.decoder, self._bundle.limits.max_context
        shape = (slots, decoder.n_kv_heads, whole_rows(rows, most), decoder.head_dim)
        dtype = np.dtype(self._bundle.cache_dtype)
        return DeviceCache(self._device, self._spec.caches, shape, dtype, most=most, rows_first=self._rows_first)

    # Loading

    def _open(self) -> ort.InferenceSession:
        try:
            return self._open_with(self.graph_use.kind == "captured")
        except PixtralError as error:
            if NO_CAPTURE not in str(error):
                raise
            self.graph_use.refused = str(error)
            return self._open_with(False)

    def _open_with(self, cuda_graphs: bool) -> ort.InferenceSession:
        options = {
            "device_id": str(self._settings.device),
            "user_compute_stream": str(self._device.stream),
            "enable_cuda_graph": str(int(cuda_graphs)),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # otherwise every new image size is tried with all of them
            "use_tf32": "0",
        }
        providers: list[str | tuple[str, dict[str, str]]] = [(CUDA, options), CPU] if self._place == "cuda" else [CPU]
        batched = self._settings.many_slots and bool(self._spec.caches) and self._bundle.precision == "int4"
        with ort_errors(self._path, "is damaged"):
            graph, weights, self._rows_first = lowered(
                self._path,
                by_length=self._settings.by_length,
                block=BLOCK_OF_BATCHED_KERNELS if batched else None,
            )
            session = open_graph(
                graph,
                providers=providers,
                weights=self._bundle.path,
                more_weights=weights,
                entries=WITH_BATCHED_KERNELS if batched else {},
                plans_memory=not batched,
            )
        if self._place == "cpu":  # read where they are; a device has its own copies now
            self._weights = weights
        if self._place == "cuda" and CUDA not in session.get_providers():
            raise MachineError(
                f"ONNX Runtime runs the {self._spec.name} graph without {CUDA}: no device, or libraries missing",
                "nvidia-smi, then pixtral doctor",
                Option("backend", "ort-cpu"),
            )
        return session

    # Running

    def _feed(self, feeds: Mapping[str, Array | Buffer]) -> list[_Tensor]:
        """Put what comes from the host on the device: small feeds together, in one copy."""
        bound, small, end = [], [], 0
        for name, value in feeds.items():
            if isinstance(value, DeviceBuffer):
                bound.append(_Tensor(name, value.address, value.shape, value.dtype))
                continue
            array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
            if end + array.nbytes <= SMALL_FEEDS_BYTES:
                bound.append(_Tensor(name, self._small.address + end, array.shape, array.dtype))
                padding = -array.nbytes % ALIGNMENT
                small += [array.tobytes(), bytes(padding)]
                end += array.nbytes + padding
                continue
            if name not in self._fed or self._fed[name].nbytes < array.nbytes:
                self._fed[name] = Memory(self._device, array.nbytes)
            self._device.copy_to_device(self._fed[name].address, array)
            bound.append(_Tensor(name, self._fed[name].address, array.shape, array.dtype))
        if small:
            self._device.copy_to_device(self._small.address, np.frombuffer(b"".join(small), np.uint8))
        return bound

    def _sizes(self, inputs: list[_Tensor]) -> dict[str | int, int]:
        """What each letter of `spec` stands for in this run."""
        sizes: dict[str | int, int] = {}
        for tensor in inputs:
            sizes |= zip(self._inputs[tensor.name].shape, tensor.shape, strict=False)
        if self._spec.name == "vision":
            patch = self._bundle.model.vision.token_edge
            sizes["P"] = (sizes["H"] // patch) * (sizes["W"] // patch)
        return sizes

    def _output(self, tensor: TensorSpec, sizes: Mapping[str | int, int]) -> DeviceBuffer:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
        dtype, pool = np.dtype(tensor.dtype), self._pools[tensor.name]
        nbytes = math.prod(shape) * dtype.itemsize
        fitting = [memory for memory in pool if memory.nbytes >= nbytes]
        memory = min(fitting, key=lambda memory: memory.nbytes) if fitting else Memory(self._device, nbytes)
        pool[:] = [other for other in pool if other is not memory and other.nbytes >= nbytes]
        return DeviceBuffer(self._device, pool, memory, shape, dtype)

    def _step(self, bound: tuple[_Tensor, ...], past: DeviceCache | None, *, may_recur: bool) -> _Step:
        """The run over this memory. Its third repetition is recorded."""
        key = bound if past is None else (*bound, past.shape, past.addresses)
        step = self._steps.get(key)
        if step is None:
            step = _Step(self._bind(bound, past))
            if may_recur and self.graph_use.kind != "off" and not self.graph_use.refused:
                self._steps[key] = step
        elif step.runs == REPEATS_BEFORE_GRAPH and self.graph_use.graphs < MOST_CUDA_GRAPHS:
            self.graph_use.graphs += 1
            step.graph = str(self.graph_use.graphs)
        step.runs += 1
        if step.graph == NO_GRAPH:
            self.graph_use.plain += 1
        else:
            self.graph_use.replayed += 1
        return step

    def _bind(self, bound: tuple[_Tensor, ...], cache: DeviceCache | None) -> ort.IOBinding:
        """Past and present are one memory, so that a step writes a few rows instead of copying all of them."""
        binding = self._session.io_binding()
        where = (self._place, self._settings.device)
        for name, address, shape, dtype in bound:
            bind = binding.bind_input if name in self._inputs else binding.bind_output
            bind(name, *where, dtype, shape, address)
        if cache is not None:
            for (past, present), address in zip(self._spec.caches, cache.addresses, strict=True):
                binding.bind_input(past.name, *where, cache.dtype, cache.bound_shape, address)
                binding.bind_output(present.name, *where, cache.dtype, cache.bound_shape, address)
        return binding

    def _run_options(self, graph: str) -> ort.RunOptions:
        if graph not in self._options:
            import onnxruntime as ort

            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", graph)
            # Nothing waits for the device before its result is wanted.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._options[graph] = options
        return self._options[graph]


def open_cuda_sessions(
    bundle: Bundle, device: DeviceStream, settings: CudaSettings = CudaSettings(), place: str = "cuda"
) -> Sessions:
    """A bundle's three graphs on one device. Raises MachineError as `OrtCudaSession` does."""
    if chosen := os.environ.get(BATCHED_KERNELS):
        settings = replace(settings, many_slots=chosen not in ("0", "off"))
    vision, embed, decoder = (OrtCudaSession(bundle, graph, device, settings, place) for graph in GRAPHS)
    return Sessions(
        vision,
        embed,
        decoder,
        chunk=CUDA_CHUNK_TOKENS,
        replays=settings.cuda_graphs,
        picks=True,
        free_bytes=device.free_bytes(),
    )


def with_rows_first(graph: GraphSpec) -> GraphSpec:
    """The decoder's tensors with caches as `ort_cuda_attention.put_rows_first` leaves them."""

    def turned(tensor: TensorSpec) -> TensorSpec:
        slots, heads, rows, size = tensor.shape
        return replace(tensor, shape=(slots, rows, int(heads) * int(size)))

    caches = tuple((turned(past), turned(present)) for past, present in graph.caches)
    now = {tensor.name: tensor for pair in caches for tensor in pair}
    inputs, outputs = (tuple(now.get(one.name, one) for one in ones) for ones in (graph.inputs, graph.outputs))
    return replace(graph, inputs=inputs, outputs=outputs, caches=caches)


def refuse_wide_products(bundle: Bundle) -> None:
    """Raise MachineError for a bundle whose weights CUDA would turn to float32 at every token."""
    if bundle.precision in WIDENED:
        raise MachineError(
            f"ONNX Runtime's CUDA has no products of {bundle.precision}: it would widen all weights to float32 for "
            "every token",
            f"pixtral export CHECKPOINT -o {bundle.path} --precision int4",
        )


def lists_cuda() -> bool:
    """Whether an ONNX Runtime built with CUDA is installed."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    return CUDA in ort.get_available_providers()


def require_provider() -> None:
    """Raise MachineError where ONNX Runtime is built without CUDA."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise extra_missing("onnxruntime-gpu", "gpu", "Running a bundle on a CUDA device") from error
    if not lists_cuda():
        raise MachineError(
            f"onnxruntime {ort.__version__} is built without CUDA",
            "pip uninstall -y onnxruntime && pip install 'pixtral[gpu]'",
        )


def load_libraries() -> None:
    """Load CUDA's libraries and cuDNN. Raises MachineError where ONNX Runtime cannot open a device with them."""
    import onnxruntime as ort

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()  # where pip installed them
    try:
        ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, "cuda")
    except RuntimeError as error:
        raise MachineError(
            f"ONNX Runtime cannot open a CUDA device: {error}", "nvidia-smi, then pixtral doctor"
        ) from error
    try:
        ctypes.CDLL(CUDNN)
    except OSError as error:
        raise MachineError(f"cuDNN 9 is missing, which pictures need: {error}", "pip install 'pixtral[gpu]'") from error
