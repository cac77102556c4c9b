"""Whether a test of the mark `gpu` may be skipped: on a sign that no GPU is here, never because code of ours failed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRE_GPU = "PIXTRAL_REQUIRE_GPU"
DEVICE_FILES = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg")  # a card, Jetsons of JetPack 5 and 6, WSL
NONE_LISTED = "No devices were found"  # nvidia-smi -L
SMI_TIMEOUT_S = 60


def skip_without_gpu(provider: str | None = None) -> None:
    """Skip the test that runs where there is no GPU, or no ONNX Runtime with `provider`; PIXTRAL_REQUIRE_GPU=1: fail.

    A driver that does not answer is no reason to skip: such a test runs, and says what is wrong.
    """
    reason = no_gpu() or (no_provider(provider) if provider else "")
    if not reason:
        return
    if os.environ.get(REQUIRE_GPU, "0") != "0":
        pytest.fail(f"{REQUIRE_GPU} is set, and there is {reason}", pytrace=False)
    pytest.skip(f"there is {reason}")


def no_gpu(devices: Path = Path("/dev")) -> str:
    """What shows that this machine has no NVIDIA GPU; empty where nothing does."""
    if any(file for pattern in DEVICE_FILES for file in devices.glob(pattern)):
        return ""
    if shutil.which("nvidia-smi") is None:
        return f"no NVIDIA GPU: no nvidia-smi, and no {devices}/nvidia0"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=SMI_TIMEOUT_S)
    return f"no NVIDIA GPU: nvidia-smi -L says '{NONE_LISTED}'" if NONE_LISTED in listed.stdout + listed.stderr else ""


def no_provider(provider: str) -> str:
    """What shows that the ONNX Runtime installed was built without a provider; empty where it has it."""
    import onnxruntime as ort

    if provider in (listed := ort.get_available_providers()):
        return ""
    return f"no {provider} in onnxruntime {ort.__version__}, which has {', '.join(listed)}"
