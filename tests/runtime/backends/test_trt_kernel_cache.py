"""TensorRT-RTX compiles kernels once a machine, not once a process; and no cache of them stops a run."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO
from helpers.trt_engines import engine_file, hidden_of, step_feeds
from helpers.trt_standin import StandIn
from helpers.trt_surface import RTX_1_7
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.trt_kernel_cache import kernel_file
from pixtral_runtime.backends.trt_session import TrtSession
from pixtral_runtime.bundle.manifest import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


def compiled(bundle: Bundle, path: Path) -> int:
    """Kernels that a process compiled which opened an engine, ran a step, and ended."""
    trt = StandIn(HostDevice(), RTX_1_7)
    decoder = TrtSession(trt, engine_file(bundle, "decoder"), bundle, "decoder", trt.device, kernels=path)
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.array([[0]]))
    decoder.run(feeds, decoder.new_cache(1, 1))["logits"].numpy()
    del decoder
    gc.collect()
    return trt.compiled


def test_the_next_process_compiles_nothing_again(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "decoder.kernels"
    assert compiled(bundle, path) == 1
    kept, made = path.read_bytes(), path.stat().st_mtime_ns
    assert compiled(bundle, path) == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (kept, made)  # what is the same is not written
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("found", [b"", b"\xff\xfe nonsense", b"kernels of 1.6.0\nall of them"])
def test_what_tensorrt_does_not_take_is_made_again(found: bytes, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "decoder.kernels"
    path.write_bytes(found)
    assert [compiled(bundle, path) for _ in range(2)] == [1, 0]


def test_a_cache_that_cannot_be_read_or_written_stops_nothing(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "decoder.kernels", Path("/proc/none/decoder.kernels")):
        assert compiled(bundle, path) == 1


def test_each_engine_on_each_gpu_has_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = [("decoder", "a" * 64, "NVIDIA L4"), ("embed", "a" * 64, "NVIDIA L4"), ("decoder", "b" * 64, "NVIDIA L4")]
    files = {kernel_file(*one) for one in (*asked, ("decoder", "a" * 64, "NVIDIA GeForce RTX 4090/Ti"))}
    assert len(files) == 4
    assert {path.parent for path in files if path} == {tmp_path / "pixtral/tensorrt-rtx"}
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert kernel_file(*asked[0]) is None
