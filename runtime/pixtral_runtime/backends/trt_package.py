"""Which TensorRT is at hand, `tensorrt` or `tensorrt_rtx` from PyPI, and what it says while it works.

They share one API; only this file names them. TensorRT keeps one logger per process and ignores a second one while a
builder lives, so there is one log per package.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

from pixtral_runtime.errors import extra_missing

Flavor = Literal["trt", "rtx"]
TENSORRT_PACKAGES: dict[Flavor, tuple[str, str]] = {"trt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}
"""Package and the extra that installs it. An engine of one does not run in the other."""


@dataclass
class TensorRTLog:
    """What TensorRT warned of and complained of, oldest first. `logger` is the object TensorRT writes to."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    logger: Any = None

    def complaint(self, before: int) -> str:
        """The first error after so many."""
        return next(iter(self.errors[before:]), "no reason given")


def import_tensorrt(flavor: Flavor) -> ModuleType:
    """Import a TensorRT. Raises MachineError where it is not installed."""
    package, extra = TENSORRT_PACKAGES[flavor]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise extra_missing(package, extra, "Building and running engines") from error


def version_of(trt: ModuleType) -> str:
    """Package and version, as manifests name it."""
    return f"{trt.__name__} {trt.__version__}"


@lru_cache
def log_of(trt: ModuleType) -> TensorRTLog:
    """The process's log of a TensorRT package."""
    log = TensorRTLog()
    lists = {
        trt.ILogger.INTERNAL_ERROR: log.errors,
        trt.ILogger.ERROR: log.errors,
        trt.ILogger.WARNING: log.warnings,
    }

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in lists:
                lists[severity].append(message)

    log.logger = Logger()
    return log
