"""What runs a bundle: engines where they fit this machine, the CPU otherwise, and always a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO, IMAGES
from helpers.trt_standin import StandIn, write_engine
from helpers.trt_surface import RTX_1_7, TRT_11_4
from pixtral_cli.main import app
from pixtral_engines.profiles import Shapes, profiles
from pixtral_runtime import Model, load
from pixtral_runtime.backends import choose as backend
from pixtral_runtime.backends.choose import open_backend
from pixtral_runtime.batch import worker as workers
from pixtral_runtime.batch.fit import most_rows
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bundle.engine_list import Engine, EngineSet, source_of, with_engines
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import EngineError, InputError, MachineError, OtherGpuError
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.prompt import PromptBuilder

IMAGE = IMAGES / "gray_circle_99x70.png"
SHAPES = Shapes(context=256, batch=1, chunk=16)
VERSION = "tensorrt_rtx 1.7.1.116"


class Gpu(HostDevice):
    capability = 89


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    """A machine with a GPU of 8.9, TensorRT-RTX and TensorRT."""
    device = Gpu()
    packages = {"rtx": StandIn(device, RTX_1_7), "trt": StandIn(device, TRT_11_4)}
    monkeypatch.setattr(backend, "import_tensorrt", packages.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return device


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = exported(DEMO, tmp_path_factory.mktemp("b") / "b")
    sets = []
    for name, shapes in (("rtx:sm89", SHAPES), ("rtx:sm89@64", replace(SHAPES, context=64))):
        listed = {}
        for graph in GRAPHS:
            path = made.path / f"{graph}.{shapes.context}.engine"
            file = write_engine(path, made, graph, shapes.context, profiles(made, graph, shapes))
            listed[graph] = Engine(file.name, file.stat().st_size, sha256_of_file(file), source_of(made, graph), [])
        sets.append(EngineSet(name, VERSION, "float16", shapes.context, 1, shapes.chunk, listed))
    return with_engines(made, *sets)


def opened(bundle: Bundle, device: Any, name: str = "auto", rows: int | None = None) -> Any:
    return open_backend(bundle, name, gpu=lambda: device, rows=rows)


def test_auto_takes_engines_for_this_gpu_and_they_answer_alike(bundle: Bundle, device: Gpu) -> None:
    found = opened(bundle, device)
    assert (found.backend, found.sessions.chunk) == ("rtx", 16)
    assert found.reason == f"engines for rtx:sm89 of 256 rows by {VERSION}"
    theirs = load(bundle.path, backend="ort-cpu")
    ours = Model(bundle, found.sessions, theirs.prompts)
    a, b = (model.generate("Describe this image in one short sentence.", [IMAGE]) for model in (ours, theirs))
    assert a.token_ids == b.token_ids and len(a.token_ids) > 1


@pytest.mark.parametrize(("rows", "taken"), [(None, 256), (1, 64), (64, 64), (65, 256), (300, 256)])
def test_a_job_takes_the_engines_of_the_fewest_rows_that_suffice(
    rows: int | None, taken: int, bundle: Bundle, device: Gpu
) -> None:
    found = opened(bundle, device, "rtx", rows)
    assert found.sessions.context == taken and f"of {taken} rows" in found.reason
    cache = found.sessions.decoder.new_cache(1, 1)
    assert cache.rows == taken


def test_a_worker_loads_other_engines_for_longer_requests_only(
    bundle: Bundle, device: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def load_bundle(bundle: Bundle, prompts: PromptBuilder, *, rows: int | None, **_: object) -> Model:
        asked.append(rows)
        return Model(bundle, opened(bundle, device, "rtx", rows).sessions, prompts)

    monkeypatch.setattr(workers, "load_bundle", load_bundle)
    bundle.write()
    worker = Worker(bundle.path, Settings(bundle.fingerprint), WorkerOptions(backend="rtx"))
    contexts = []
    for text in ("short", "go " * 60, "short", "go " * 400, "go " * 500):
        requests = [Request("a", user_message(text), 4)]
        tokens = len(worker.prompts.build(user_message(text)).token_ids)
        worker.job(requests, {})
        assert tokens + 4 <= most_rows(worker.prompts, requests)
        contexts.append(worker.model.runner.sessions.context)
    assert contexts == [64, 256, 256, 256, 256] and len(asked) == 3, "the last one asks in vain and does not ask again"


def test_auto_takes_the_cpu_where_engines_do_not_fit_and_says_why(bundle: Bundle, device: Gpu) -> None:
    device.capability = 120
    found = opened(bundle, device)
    assert found.backend == "ort-cpu" and "no engines for rtx:sm120" in found.reason
    device.capability = 89
    listed = bundle.engines["rtx:sm89"]
    other = listed["graphs"] | {"embed": listed["graphs"]["embed"] | {"source_sha256": "0"}}
    stale = replace(bundle, engines={"rtx:sm89": listed | {"graphs": other}})
    assert "built from another embed graph" in opened(stale, device).reason
    assert opened(replace(bundle, engines={}), device).reason == "the bundle lists no engines"


def test_engines_asked_for_by_name_are_never_replaced_by_the_cpu(bundle: Bundle, device: Gpu) -> None:
    device.capability = 120
    with pytest.raises(OtherGpuError, match="no engines for rtx:sm120") as other_gpu:
        opened(bundle, device, "rtx")
    assert other_gpu.value.hint.endswith("--target rtx:sm120")
    with pytest.raises(MachineError, match="no engines for trt"):
        opened(bundle, device, "trt")
    with pytest.raises(EngineError, match="there are: none"):
        opened(replace(bundle, engines={}), device, "rtx")
    assert opened(bundle, device, "ort-cpu").reason == "asked for"
    with pytest.raises(InputError, match="no backend 'cuda'") as caught:
        opened(bundle, device, "cuda")
    assert "backend=auto|ort-cpu|ort-cuda|rtx|trt" in caught.value.hint


def test_engines_that_were_built_on_another_gpu_say_so(bundle: Bundle, device: Gpu) -> None:
    """Kernels of `trt` were measured on one GPU: another model is said, another generation refused."""
    listed = bundle.engines["rtx:sm89"] | {"target": "trt", "tensorrt": "tensorrt 11.4.0.106"}

    def built_on(gpu: str, capability: int) -> Bundle:
        return replace(bundle, engines={"trt": listed | {"gpu": gpu, "capability": capability}})

    assert "built on" not in opened(built_on(device.name, 89), device).reason
    found = opened(built_on("NVIDIA L4", 89), device)
    assert found.backend == "trt" and f"built on NVIDIA L4, here is {device.name}: pixtral build" in found.reason
    with pytest.raises(OtherGpuError, match=r"built on NVIDIA A10 \(compute capability 8\.6\), here is Stand-In"):
        opened(built_on("NVIDIA A10", 86), device, "trt")
    assert opened(built_on("NVIDIA A10", 86), device).backend == "ort-cpu"


def test_without_a_gpu_the_commands_use_the_cpu_or_say_what_is_missing(bundle: Bundle) -> None:
    bundle.write()
    asked = ["ask", str(bundle.path), str(IMAGE), "-p", "what color is the shape?"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "ort-cpu: rtx: " in done.stderr
    assert "ort-cpu" not in CliRunner().invoke(app, [*asked, "-q"]).stderr
    refused = CliRunner().invoke(app, [*asked, "--backend", "rtx"])
    assert refused.exit_code == 4, refused.stderr
    with pytest.raises(MachineError):
        load(bundle.path, backend="rtx")
