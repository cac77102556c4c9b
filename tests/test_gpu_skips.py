"""A test of the mark `gpu` is skipped where there is no GPU, and for no other reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from helpers import gpu
from helpers.gpu import NONE_LISTED, REQUIRE_GPU, no_gpu, no_provider, skip_without_gpu
from helpers.places import ROOT

PROVIDER = "CUDAExecutionProvider"


def pretend_smi(monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    done = subprocess.CompletedProcess(["nvidia-smi"], code, text, "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert no_gpu(tmp_path).startswith("no NVIDIA GPU: no nvidia-smi")
    pretend_smi(monkeypatch, 6, f"{NONE_LISTED}\n")
    assert NONE_LISTED in no_gpu(tmp_path)


@pytest.mark.parametrize("name", ["nvidia0", "nvidia12", "nvhost-gpu", "nvgpu", "dxg"])
def test_a_device_file_is_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "nvidia-caps").touch()
    assert no_gpu(tmp_path)
    (tmp_path / name).touch()
    assert no_gpu(tmp_path) == ""


def test_a_driver_that_fails_is_no_sign_that_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_smi(monkeypatch, 9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    assert no_gpu(tmp_path) == ""


def test_a_provider_is_there_or_the_reason_lists_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert no_provider(PROVIDER).startswith(f"no {PROVIDER} in onnxruntime")
    assert no_provider(PROVIDER).endswith("which has CPUExecutionProvider")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    assert no_provider(PROVIDER) == ""


@pytest.mark.parametrize(("gpu_reason", "provider_reason"), [("no GPU", ""), ("", "no provider")])
def test_a_reason_skips_and_fails_where_a_gpu_is_required(
    gpu_reason: str, provider_reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "no_gpu", lambda: gpu_reason)
    monkeypatch.setattr(gpu, "no_provider", lambda provider: provider_reason)
    monkeypatch.delenv(REQUIRE_GPU, raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no"):
        skip_without_gpu(PROVIDER)
    monkeypatch.setenv(REQUIRE_GPU, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{REQUIRE_GPU} is set, and there is no"):
        skip_without_gpu(PROVIDER)


def test_a_machine_with_a_gpu_runs_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(gpu, "no_provider", lambda provider: "no provider")
    monkeypatch.setenv(REQUIRE_GPU, "1")
    skip_without_gpu()  # a test that needs no provider


@pytest.mark.parametrize("required", ["0", "1"])
def test_every_test_of_the_mark_is_asked(required: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), REQUIRE_GPU: required}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    expected = "1 passed" if not no_gpu() else "1 error" if required == "1" else "1 skipped"
    assert expected in done.stdout, done.stdout + done.stderr
