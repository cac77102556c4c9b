"""Which TensorRT is at hand, `tensorrt` or `tensorrt_rtx` from PyPI, and what it says while it works.

They share most of one API; only this file names them. TensorRT keeps one logger per process and ignores a second one
while a builder lives, so there is one log per package. What it warns of goes on to Python's logger `pixtral.tensorrt`,
once each.
"""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

from pixtral_runtime.errors import MachineError, MemoryShortageError, Option, Remedy, extra_missing

Flavor = Literal["trt", "rtx"]
TENSORRT_PACKAGES: dict[Flavor, tuple[str, str]] = {"trt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}
"""Package and the extra that installs it. An engine of one does not run in the other."""
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|could not be allocated|memory allocation failed", re.IGNORECASE)
KEPT_TO_US = re.compile(r"has Int64 binding")  # the importer reminds of what bundles do
SAID = logging.getLogger("pixtral.tensorrt")


@dataclass
class TensorRTLog:
    """What TensorRT warned of and complained of, oldest first. `logger` is the object TensorRT writes to."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    logger: Any = None

    def complaint(self, before: int) -> str:
        """The first error after so many."""
        return next(iter(self.errors[before:]), "no reason given")

    def failure(self, what: str, before: int, *remedies: Remedy) -> MachineError:
        """The error for what TensorRT could not do: memory is short where one of the errors since then says so."""
        shortage = next(filter(OUT_OF_MEMORY.search, self.errors[before:]), None)
        if shortage is None:
            return MachineError(f"TensorRT cannot {what}: {self.complaint(before)}", *remedies)
        return MemoryShortageError(
            f"the GPU has too little memory: TensorRT cannot {what}: {shortage}",
            Option("batch", "SMALLER"),
            "pixtral build BUNDLE with a smaller --context or --batch, and nvidia-smi for what else uses it",
        )


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
                is_new = message not in log.warnings
                lists[severity].append(message)
                if severity == trt.ILogger.WARNING and is_new and not KEPT_TO_US.search(message):
                    SAID.warning("TensorRT: %s", message)

    log.logger = Logger()
    return log
