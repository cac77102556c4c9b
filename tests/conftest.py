"""What all tests share: the versions they ran with, and real pictures where they are at hand."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from helpers.gpu import skip_without_gpu
from helpers.places import MADE, SHARED

PACKAGES = ("numpy", "onnxruntime", "mistral-common", "opencv-python-headless", "torch", "onnx", "transformers")
SHARED_IMAGES = SHARED / "images"


def pytest_report_header() -> str:
    return f"python {platform.python_version()}, " + ", ".join(f"{name} {installed(name)}" for name in PACKAGES)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def pytest_configure(config: pytest.Config) -> None:
    """A folder for the bundles and traces that tests share, in the process that starts the others.

    And threads that wait leave their core to the run's other process, which needs it: those of torch and ONNX Runtime
    keep it busy otherwise. A shell that starts the run in the background lets it ignore Ctrl-C, and with it all that
    tests start, some of which is to be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ[MADE] = tempfile.mkdtemp(prefix="pixtral-tests-")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, which reads it then


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(MADE), ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before fixtures export bundles for a test that is skipped
def pytest_runtest_setup(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("gpu"):
        skip_without_gpu(**mark.kwargs)


@pytest.fixture(scope="session", autouse=True)
def each_piece_is_traced_once_a_run() -> None:
    if "pixtral_export.graphs.assemble" in sys.modules:  # tests that export have imported it by now
        from helpers.traces import share_traces

        share_traces()


@pytest.fixture(autouse=True)
def no_lasting_choice_of_a_gpu() -> Iterator[None]:
    """A command with --device lets its process see one GPU only."""
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def shared_images() -> Path:
    """A folder of real pictures with a manifest, beside the project."""
    if not SHARED_IMAGES.is_dir():
        pytest.skip("no folder ../shared/images beside the project")
    return SHARED_IMAGES


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A tiny checkpoint in Mistral's format."""
    from helpers.tiny import tiny_config, write_checkpoint

    return write_checkpoint(tmp_path / "mistral", tiny_config())


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tiny checkpoint in Hugging Face's format, in two shards."""
    from helpers.tiny import tiny_config, write_checkpoint

    return write_checkpoint(tmp_path / "hf", tiny_config(), format="hf", shards=2)
