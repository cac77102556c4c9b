"""The Session protocol over ONNX Runtime.

The cache is bound as input and output of the same buffer, so a step writes a few rows instead of copying it all. The
weights are mapped from the bundle's weight file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.bundle import Bundle
from pixtral_runtime.errors import MachineError, extra_missing
from pixtral_runtime.session import Array, Buffer, KVCache
from pixtral_runtime.spec import GraphSpec, cache_names

if TYPE_CHECKING:
    import onnxruntime as ort

CACHE_STEP = 256  # rows; attention reads every bound row, so a cache is kept as short as the text needs


@dataclass(frozen=True)
class OrtSettings:
    threads: int = 0  # 0: as many as there are cores
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


class OrtCache:
    """Cache buffers on the host, one NumPy array and one OrtValue over it per tensor."""

    def __init__(self, names: tuple[str, ...], shape: tuple[int, int, int, int], dtype: str) -> None:
        self._names, self._shape = names, shape
        self._arrays = [np.zeros(shape, dtype) for _ in names]
        self._wrap()

    @property
    def slots(self) -> int:
        return self._shape[0]

    @property
    def rows(self) -> int:
        return self._shape[2]

    def reserve(self, rows: int) -> None:
        if rows <= self.rows:
            return
        slots, heads, filled, head_dim = self._shape
        self._shape = (slots, heads, -(-rows // CACHE_STEP) * CACHE_STEP, head_dim)
        for index, old in enumerate(self._arrays):
            self._arrays[index] = np.zeros(self._shape, old.dtype)
            self._arrays[index][:, :, :filled] = old
        self._wrap()

    def layers(self) -> list[tuple[Array, Array]]:
        return list(zip(self._arrays[::2], self._arrays[1::2], strict=True))  # `cache_names` has key before value

    def bind(self, binding: ort.IOBinding) -> None:
        for past, value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(past.replace("past", "present", 1), value)

    def _wrap(self) -> None:
        import onnxruntime as ort

        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]


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


class OrtSession:
    """One graph of a bundle in ONNX Runtime. Raises MachineError where ONNX Runtime cannot run it."""

    def __init__(self, bundle: Bundle, graph: str, settings: OrtSettings) -> None:
        refuse_missing_kernels(bundle)
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise extra_missing("onnxruntime", "cpu", "Running a bundle") from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        self._spec: GraphSpec = bundle.graph_spec(graph)
        self._bundle = bundle
        self._session = ort.InferenceSession(bundle.graph_path(graph), options, providers=list(settings.providers))
        self._outputs = [tensor.name for tensor in self._spec.outputs if not tensor.name.startswith("present_")]

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        if isinstance(cache, OrtCache):
            cache.bind(binding)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=False))

    def new_cache(self, slots: int, rows: int) -> OrtCache:
        decoder = self._bundle.model.decoder
        names = cache_names("past", decoder.n_layers)
        rows = -(-rows // CACHE_STEP) * CACHE_STEP
        return OrtCache(names, (slots, decoder.n_kv_heads, rows, decoder.head_dim), self._bundle.cache_dtype)
