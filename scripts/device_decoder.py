"""A decoder in ONNX Runtime's CUDA over fixed buffers: eager steps and CUDA graphs in one session, on our stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from device_results import native_log

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
EAGER = -1
VERBOSE = 0


class Stream:
    """A stream of our own, by `CudaDevice` where that opens and by the CUDA runtime itself elsewhere."""

    def __init__(self) -> None:
        self._runtime = ctypes.CDLL("libcudart.so.13")
        try:
            from pixtral_runtime.backends.cuda import CudaDevice

            self.device: Any = CudaDevice()
            self.handle, self.made_by = int(self.device.stream), "CudaDevice"
        except Exception as error:  # what stands in for CUDA in a rehearsal is not enough for cuda-bindings
            handle = ctypes.c_void_p()
            status = self._runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), 1)
            if status or not handle.value:
                raise RuntimeError(f"no stream: status {status}") from error
            self.handle, self.made_by = handle.value, f"libcudart, for {type(error).__name__}: {error}"

    def wait(self) -> None:
        """For all work on the device, whichever stream it is on."""
        if status := self._runtime.cudaDeviceSynchronize():
            raise RuntimeError(f"cudaDeviceSynchronize: {status}")


def open_cuda(path: Path, options: dict[str, str], *, verbose: bool = False) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = VERBOSE if verbose else 3
    settings.log_verbosity_level = 1 if verbose else 0
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    providers = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    session = ort.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError(f"{path.name}: the CUDA provider did not open: {session.get_providers()}")
    return session


def open_cpu(path: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run_options(graph: int | None, *, wait: bool = True, verbose: bool = False) -> ort.RunOptions:
    options = ort.RunOptions()
    if graph is not None:
        options.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if verbose:
        options.log_severity_level, options.log_verbosity_level = VERBOSE, 10
    return options


class Decoder:
    """One decoder and one cache of `slots` by `rows`, whose memory calls of fewer slots and rows share.

    `captures`: the session takes CUDA graphs, and a call says by a number which one it is.
    """

    def __init__(self, path: Path, stream: Stream, slots: int, rows: int, *, captures: bool, own_stream: bool) -> None:
        options = {"device_id": "0"}
        if captures:
            options["enable_cuda_graph"] = "1"
        if own_stream:
            options["user_compute_stream"] = str(stream.handle)
        self.session, self.stream, self.captures = open_cuda(path, options), stream, captures
        inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        first = inputs["past_key_0"]
        self.heads, self.head_dim = int(first.shape[1]), int(first.shape[3])
        self.dim, self.kind = int(inputs["hidden"].shape[2]), KINDS[inputs["hidden"].type]
        self.vocab = int(self.session.get_outputs()[0].shape[1])
        self.pasts = [name for name in inputs if name.startswith("past")]
        shape = (slots, self.heads, rows, self.head_dim)
        block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(self.kind)
        content = np.resize(block, shape)
        self.cache = [ort.OrtValue.ortvalue_from_numpy(content, "cuda", 0) for _ in self.pasts]


class Call:
    """Steps of one shape: `tokens` a slot behind `start` rows, in buffers that stay where they are."""

    def __init__(
        self, decoder: Decoder, slots: int, tokens: int, rows: int, *, graph: int = EAGER, start: int | None = None
    ) -> None:
        self.decoder, self.shape = decoder, (slots, tokens, rows)
        self.graph = graph if decoder.captures else None
        start = rows - tokens if start is None else start
        random = np.random.default_rng(1)
        hidden = random.standard_normal((slots, tokens, decoder.dim), np.float32).astype(decoder.kind)
        positions = np.tile(start + np.arange(tokens, dtype=np.int64), (slots, 1))
        index = np.arange(1, slots + 1, dtype=np.int64) * tokens - 1
        feeds = {"hidden": hidden, "position_ids": positions, "write_index": positions[:, 0].copy()}
        feeds["logits_index"] = index
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in feeds.items()}
        self.logits = ort.OrtValue.ortvalue_from_numpy(np.full((slots, decoder.vocab), np.nan, np.float32), "cuda", 0)
        self.binding = decoder.session.io_binding()
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("logits", self.logits)
        shape = (slots, decoder.heads, rows, decoder.head_dim)
        for name, value in zip(decoder.pasts, decoder.cache, strict=True):
            memory = ("cuda", 0, decoder.kind, shape, value.data_ptr())
            self.binding.bind_input(name, *memory)
            self.binding.bind_output(name.replace("past", "present", 1), *memory)
        self._waits, self._runs_on = run_options(self.graph), run_options(self.graph, wait=False)

    def step(self) -> None:
        """Run, and wait for the end."""
        self.decoder.session.run_with_iobinding(self.binding, self._waits)
        self.decoder.stream.wait()

    def queue(self) -> None:
        """Run without waiting."""
        self.decoder.session.run_with_iobinding(self.binding, self._runs_on)

    def fresh_logits(self) -> np.ndarray[Any, Any]:
        """A step's logits, into a buffer that held none."""
        self.logits.update_inplace(np.full((self.shape[0], self.decoder.vocab), np.nan, np.float32))
        self.step()
        return np.array(self.logits.numpy())

    def kernel_lines(self) -> dict[str, int]:
        """What ONNX Runtime says of its attention kernels in one eager step, with how often it says it."""
        lines: list[str] = []
        ort.set_default_logger_severity(VERBOSE)
        ort.set_default_logger_verbosity(10)
        with native_log(lines):
            self.decoder.session.run_with_iobinding(
                self.binding, run_options(None if self.graph is None else EAGER, verbose=True)
            )
        ort.set_default_logger_severity(3)
        said = [line.partition("ONNX Attention")[2][:160] for line in lines if "ONNX Attention" in line]
        return {text: said.count(text) for text in dict.fromkeys(said)}


def relative(seen: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """The largest difference by the largest value; NaN where one of them has any."""
    a, b = seen.astype(np.float64), expected.astype(np.float64)
    return float(f"{np.abs(a - b).max() / max(np.abs(b).max(), 1e-30):.3g}")


def placement(lines: Sequence[str]) -> dict[str, int]:
    """Nodes per provider and copies between them, from a session's verbose log."""
    found: dict[str, int] = {}
    for line in lines:
        if "placed on [" in line:
            name = line.partition("placed on [")[2].partition("]")[0]
            count = line.rpartition(":")[2].strip()
            found[name] = int(count) if count.isdigit() else -1
    found["Memcpy"] = sum("MemcpyFromHost" in line or "MemcpyToHost" in line for line in lines)
    return found


def graph_inputs(path: Path, sizes: dict[str, int], random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Random float feeds for a graph; whole numbers are zeros."""
    model = onnx.load(str(path), load_external_data=False)
    kinds = {1: np.float32, 10: np.float16, 7: np.int64}
    feeds = {}
    for tensor in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in tensor.type.tensor_type.shape.dim]
        kind = kinds[tensor.type.tensor_type.elem_type]
        values = np.zeros(shape) if kind is np.int64 else 0.5 * random.standard_normal(shape)
        feeds[tensor.name] = values.astype(kind)
    return feeds
