"""Compile a bundle's graphs with TensorRT-RTX, which needs no GPU, and keep what it complains of."""

from __future__ import annotations

from pathlib import Path

import onnx
import tensorrt_rtx as trt

from pixtral_engines.lowering import dequantize_before_gather, fix_cache_rows, scatter_into_int8_cache
from pixtral_runtime.bundle import Bundle

TARGETS = ("SM86", "SM89", "SM120")
CACHE_ROWS = 256
RANGES = {
    "B": (1, 1, 2),
    "T": (1, 64, 256),
    "R": (1, 1, 256),
    "F": (1, 64, 512),
    "H": (16, 64, 256),
    "W": (16, 64, 256),
    "C": (CACHE_ROWS,) * 3,
}
"""Smallest, usual and largest size of each dynamic dimension in the engine profiles."""


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says: its importer drops inputs it does not understand with no more than a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
            self.messages.append(message)


def compile_with_tensorrt(
    bundle: Bundle, name: str, folder: Path, targets: tuple[str, ...] = TARGETS
) -> tuple[int, list[str]]:
    """Engine bytes for all targets, and what TensorRT-RTX complained of."""
    model = onnx.load(bundle.graph_path(name), load_external_data=False)
    fix_cache_rows(model, CACHE_ROWS)
    dequantize_before_gather(model)
    scatter_into_int8_cache(model)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    (folder / "weights.bin").symlink_to(bundle.path.absolute() / "weights.bin")
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    profile = builder.create_optimization_profile()
    for tensor in bundle.graph_spec(name).inputs:
        ranges = [RANGES.get(str(dim), (dim, dim, dim)) for dim in tensor.shape]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return (0 if engine is None else engine.nbytes), log.messages
