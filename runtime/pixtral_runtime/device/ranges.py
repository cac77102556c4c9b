"""Named ranges on the time line of NVIDIA's Nsight Systems, where PIXTRAL_NVTX=1 asks for them.

They need the package `nvtx`, which pixtral does not depend on. Not yet run on a device.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from pixtral_runtime.errors import MissingPackageError

VARIABLE, DOMAIN = "PIXTRAL_NVTX", "pixtral"


def named_range(name: str) -> AbstractContextManager[object]:
    """What runs within has this name there. Raises MissingPackageError where it is asked for and cannot be."""
    nvtx = _nvtx()
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain=DOMAIN)


@cache
def _nvtx() -> Any:
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return None
    try:
        return importlib.import_module("nvtx")
    except ImportError as error:
        raise MissingPackageError(
            f"{VARIABLE} needs the package 'nvtx', which is not installed", "pip install nvtx"
        ) from error
