"""The Session protocol over ONNX Runtime on the CPU.

The cache is bound as input and output of the same buffer, so a step writes a few rows instead of copying it all. The
weights are mapped from the bundle's weight file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.backends.ort_caches import OrtCache, whole_steps
from pixtral_runtime.backends.session import Array, Buffer, KVCache, own_cache
from pixtral_runtime.bundle.manifest import MANIFEST, WEIGHTS, Bundle
from pixtral_runtime.bundle.spec import GraphSpec
from pixtral_runtime.device.sysfs import int8_sums_saturate
from pixtral_runtime.errors import (
    BundleError,
    MachineError,
    MemoryShortageError,
    Option,
    PixtralError,
    SettingError,
    extra_missing,
)

if TYPE_CHECKING:
    import onnxruntime as ort

ORT_DTYPES = {"tensor(float)": "float32"} | {
    f"tensor({name})": name for name in ("float16", "bfloat16", "int64", "int8")
}
LONGEST_REASON = 300  # characters of a foreign message that are shown
WAIT_POLICY = "OMP_WAIT_POLICY"  # OpenMP's own name; torch obeys it by itself
NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory", "ALLOC_FAILED")
DEVICE_FAILURES = ("CUDA", "CUBLAS", "CUDNN", "cudaError")
FATAL = 4  # the least severe messages that ONNX Runtime logs
MOST_THREADS_PER_CORE = 16  # ONNX Runtime starts as many as it is told: with a thousand on two cores it hangs


@dataclass(frozen=True)
class OrtSettings:
    threads: int = 0  # 0: as many as there are cores


def refuse_missing_kernels(bundle: Bundle) -> None:
    """Raise MachineError for a bundle whose types ONNX Runtime cannot compute in on a CPU."""
    if bundle.dtype == "bfloat16":
        raise MachineError(
            "ONNX Runtime has no bfloat16 kernels on the CPU", "pixtral export CHECKPOINT -o BUNDLE --dtype float16"
        )
    if bundle.precision == "nvfp4":
        raise MachineError(
            "ONNX Runtime has no float4 kernels: nvfp4 is for TensorRT on Blackwell and Thor",
            "pixtral export CHECKPOINT -o BUNDLE --precision int4",
        )


def open_graph(
    model: Path | bytes,
    threads: int = 0,
    providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
    *,
    has_int8_products: bool = False,
    accuracy_level: int = 4,
    optimized: Path | None = None,
    weights: Path | None = None,
    more_weights: Mapping[str, tuple[Array, int]] = MappingProxyType({}),
    entries: Mapping[str, str] = MappingProxyType({}),
    plans_memory: bool = True,
) -> ort.InferenceSession:
    """A session of ONNX Runtime as all of ours compute; 0 threads are as many as there are cores.

    `has_int8_products`: the graph multiplies int8 activations by int8 weights. `accuracy_level` is what int4 weights
    are multiplied in: 4 is int8, 1 float32. `optimized` takes the graph as ONNX Runtime has rewritten it. `weights` is
    the folder of the weight file of a graph that is handed over as bytes, `more_weights` those that are not in it
    as arrays and ONNX's numbers of their types. `entries` are ONNX Runtime's own settings of a session; one that does
    not plan its memory takes each tensor's apart.

    Products of int8 are exact. On x86 without VNNI (AVX2, or AVX-512 alone) ONNX Runtime's kernel for uint8 by int8
    adds pairs of products in 16 bits, which saturate: outputs were seen off by 19 % of the largest. `x64quantprecision`
    takes the kernel for uint8 by uint8 there, and changes nothing elsewhere.

    Threads that wait for work keep their cores busy, which wakes them sooner; where the environment has
    OMP_WAIT_POLICY=passive they sleep, and other processes get the cores.

    Raises SettingError for a number of threads that is none, MissingPackageError without onnxruntime, BundleError for a
    file that it cannot read, MachineError where it lacks memory or a kernel.
    """
    most = MOST_THREADS_PER_CORE * (os.cpu_count() or 1)
    if not isinstance(threads, int) or not 0 <= threads <= most:
        raise SettingError(f"{threads} threads are outside 0..{most}", Option("threads", 0, "for all cores"))
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise extra_missing("onnxruntime", "cpu", "Running a graph") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    spins = os.environ.get(WAIT_POLICY, "").lower() != "passive"
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    # Errors are raised; what is logged beside them repeats them in color.
    ort.set_default_logger_severity(FATAL)
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    options.enable_mem_pattern = plans_memory
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if more_weights:
        values = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(*weight) for weight in more_weights.values()]
        options.add_external_initializers(list(more_weights), values)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    unwanted = []
    if has_int8_products:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # Merging equal pairs of QuantizeLinear and DequantizeLinear would leave products to be done in float.
        unwanted = ["CommonSubexpressionElimination"]
    with ort_errors(model, "is damaged"):
        return ort.InferenceSession(
            model, options, providers=list(providers), disabled_optimizers=unwanted, enable_fallback=0
        )


@contextmanager
def ort_errors(model: Path | bytes, fault: str) -> Iterator[None]:
    """Turns what ONNX Runtime says of a graph from a file into errors of ours; what it says of bytes are bugs.

    `fault` is what the file is or does then.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's are classes of their own, without a common one
        is_foreign = type(error).__module__.partition(".")[0] == "onnxruntime"
        # A run raises RuntimeError; where bytes of the file are quoted, the message may be no text.
        is_foreign = is_foreign or isinstance(error, RuntimeError | UnicodeDecodeError)
        if isinstance(model, bytes) or not is_foreign:
            raise
        raise _as_ours(model, fault, error) from error


def _as_ours(path: Path, fault: str, error: Exception) -> PixtralError:
    """What an error of ONNX Runtime means."""
    line = next(iter(str(error).splitlines()), "")
    reason = line[:LONGEST_REASON]
    if any(words in line for words in NO_MEMORY):  # of an allocation in a step they come late
        return MemoryShortageError(f"too little memory for {path.name}: {reason}", "pixtral plan BUNDLE")
    if type(error).__name__ == "NotImplemented":
        return MachineError(f"ONNX Runtime has no kernel for {path}: {reason}", "pip install --upgrade onnxruntime")
    if any(words in line for words in DEVICE_FAILURES):
        return MachineError(f"{path} {fault} on this GPU: {reason}", "nvidia-smi, then pixtral doctor")
    weights = path.parent / WEIGHTS
    if weights.is_symlink():
        return BundleError(
            f"{weights} is a link, and ONNX Runtime reads weights in the graph's own folder only: {reason}",
            f"cp -rL {path.parent} COPY, and name the copy",
        )
    return BundleError(f"{path} {fault}: {reason}", f"pixtral inspect {path.parent} --verify")


def _signature(name: str, shape: Sequence[object], dtype: str) -> str:
    """A tensor's name, dtype and shape, sizes that change from call to call as ?: `hidden float16 (?, ?, 5120)`."""
    return f"{name} {dtype} ({', '.join(str(size) if isinstance(size, int) else '?' for size in shape)})"


def refuse_other_graph(session: ort.InferenceSession, bundle: Bundle, spec: GraphSpec) -> None:
    """Raise BundleError for a graph with other inputs and outputs than the manifest's sizes ask for."""
    tensors = [*session.get_inputs(), *session.get_outputs()]
    seen = {_signature(t.name, t.shape, ORT_DTYPES.get(t.type, t.type)) for t in tensors}
    expected = {_signature(t.name, t.shape, t.dtype) for t in (*spec.inputs, *spec.outputs)}
    if odd := sorted(seen ^ expected):
        path = bundle.graph_path(spec.name)
        raise BundleError(
            f"{path} is not the graph that {MANIFEST} describes: they differ in {', '.join(odd[:4])}",
            f"pixtral inspect {path.parent} --verify",
        )


class OrtSession:
    """One graph of a bundle in ONNX Runtime. Raises MachineError where ONNX Runtime cannot run it."""

    def __init__(self, bundle: Bundle, graph: str, settings: OrtSettings) -> None:
        refuse_missing_kernels(bundle)
        is_int8 = bundle.precision == "int8"
        if is_int8 and not bundle.quantization.get("zero_points") and int8_sums_saturate():
            raise BundleError(
                f"{bundle.path} was exported before int8 bundles could be computed exactly on this processor",
                f"pixtral export CHECKPOINT -o {bundle.path} --precision int8 --force",
            )
        self._spec: GraphSpec = bundle.graph_spec(graph)
        self._bundle = bundle
        self._session = open_graph(bundle.graph_path(graph), settings.threads, has_int8_products=is_int8)
        refuse_other_graph(self._session, bundle, self._spec)
        presents = {present for _, present in self._spec.caches}
        self._outputs = [tensor.name for tensor in self._spec.outputs if tensor not in presents]

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Run the graph. Raises InputError for a cache that is not its own, or none where it needs one."""
        own = own_cache(self._spec, cache, OrtCache)
        with ort_errors(self._bundle.graph_path(self._spec.name), "cannot be computed"):
            binding = self._session.io_binding()
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            if own is not None:
                own.bind(binding)
            self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=False))

    def new_cache(self, slots: int, rows: int) -> OrtCache:
        decoder = self._bundle.model.decoder
        shape = (slots, decoder.n_kv_heads, whole_steps(rows), decoder.head_dim)
        tensors = self._spec.caches
        return OrtCache(tensors, [np.zeros(shape, self._bundle.cache_dtype) for _ in tensors])
