"""What stands between users and an engine ends with exit 3 or 4 and the next command to type, through the commands."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner, Result

from helpers.bundles import seal_again
from helpers.host_device import HostDevice
from helpers.networks import RTX
from helpers.places import IMAGES
from helpers.trt_standin import StandIn, write_engine
from helpers.trt_surface import RTX_1_7
from pixtral_cli.main import app
from pixtral_engines import build as building
from pixtral_engines.profiles import Shapes, profiles
from pixtral_runtime.backends import choose as backend
from pixtral_runtime.bundle.engine_list import Engine, EngineSet, source_of, with_engines
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.generation import model

IMAGE = IMAGES / "gray_circle_99x70.png"
SHAPES = Shapes(context=256, batch=1, chunk=16)
VERSION = "tensorrt_rtx 1.7.1.116"


class Gpu(HostDevice):
    capability = 89


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(bundle: Bundle) -> Result:
    return invoke("ask", bundle.path, IMAGE, "-p", "what color is the shape?", "--backend", "rtx")


@pytest.fixture
def with_sm89(copy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Bundle, Gpu]:
    """A bundle with the stand-in's engines for SM89, on a machine with such a GPU."""
    device: Any = Gpu()
    trt = StandIn(device, RTX_1_7)
    monkeypatch.setattr(backend, "import_tensorrt", lambda flavor: trt)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "open_backend", partial(backend.open_backend, gpu=lambda: device))
    listed = {}
    for graph in GRAPHS:
        file = write_engine(copy.path / f"{graph}.engine", copy, graph, SHAPES.context, profiles(copy, graph, SHAPES))
        listed[graph] = Engine(file.name, file.stat().st_size, sha256_of_file(file), source_of(copy, graph), [])
    engines = EngineSet("rtx:sm89", VERSION, "float16", SHAPES.context, SHAPES.batch, SHAPES.chunk, listed)
    bundle = with_engines(copy, engines)
    bundle.write()
    return bundle, device


def test_an_engine_for_another_gpu_names_the_ones_there_are_and_how_to_build_for_this(
    with_sm89: tuple[Bundle, Gpu],
) -> None:
    bundle, device = with_sm89
    assert ask(bundle).exit_code == 0
    device.capability = 120
    refused = ask(bundle)
    assert refused.exit_code == 4 and not refused.stdout
    assert "no engines for rtx:sm120; there are: rtx:sm89" in flat(refused)
    assert f"pixtral build {bundle.path} --target rtx:sm120" in flat(refused)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda data: data[:-1], "bytes, expected"), (lambda data: b"x" + data[1:], "sha256")],
)
def test_a_corrupted_engine_file_names_the_file_and_how_to_build_it_anew(
    with_sm89: tuple[Bundle, Gpu], spoil: Callable[[bytes], bytes], message: str
) -> None:
    bundle, _ = with_sm89
    engine = bundle.path / "decoder.engine"
    engine.write_bytes(spoil(engine.read_bytes()))
    refused = ask(bundle)
    assert refused.exit_code == 3 and "decoder.engine" in flat(refused) and message in flat(refused)
    assert "the file was changed" in flat(refused)
    assert f"pixtral build {bundle.path}" in flat(refused)


def test_an_engine_of_another_tensorrt_is_refused(with_sm89: tuple[Bundle, Gpu]) -> None:
    bundle, _ = with_sm89
    replace(bundle, engines={"rtx:sm89": bundle.engines["rtx:sm89"] | {"tensorrt": "tensorrt_rtx 1.0"}}).write()
    refused = ask(bundle)
    assert refused.exit_code == 3 and "were built by tensorrt_rtx 1.0, here is tensorrt_rtx 1.7.1.116" in flat(refused)
    assert f"pixtral build {bundle.path} --target rtx:sm89" in flat(refused)


def test_what_tensorrt_warns_of_is_shown_once(with_sm89: tuple[Bundle, Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "remark", "Engine compiled on a different model of devices.")
    bundle, _ = with_sm89
    done = ask(bundle)
    assert done.exit_code == 0 and flat(done).count("warning: TensorRT: Engine compiled on a different model") == 1


def test_memory_that_is_short_at_a_step_ends_in_exit_4(with_sm89: tuple[Bundle, Gpu]) -> None:
    bundle, device = with_sm89
    device.most_bytes = 200_000
    refused = ask(bundle)
    assert refused.exit_code == 4 and not refused.stdout and "the GPU has too little memory" in flat(refused)


def test_a_benchmark_runs_engines_and_refuses_those_that_are_stale_or_not_for_this_gpu(
    with_sm89: tuple[Bundle, Gpu],
) -> None:
    bundle, device = with_sm89

    def bench() -> Result:
        asked = ("--backend", "rtx", "--image-side", 64, "--decode-tokens", 3, "--runs", 1, "--warmup", 0)
        return invoke("bench", bundle.path, *asked)

    done = bench()
    assert done.exit_code == 0 and "tpot" in done.stdout, done.stderr
    device.capability = 120
    other = bench()
    assert other.exit_code == 4 and not other.stdout
    assert f"pixtral build {bundle.path} --target rtx:sm120" in flat(other)
    device.capability = 89
    listed = bundle.engines["rtx:sm89"]
    old = {name: engine | {"source": "another export"} for name, engine in listed["graphs"].items()}
    replace(bundle, engines={"rtx:sm89": listed | {"graphs": old}}).write()
    stale = bench()
    assert stale.exit_code == 3 and not stale.stdout
    assert f"pixtral build {bundle.path} --target rtx:sm89" in flat(stale)


@pytest.mark.parametrize(
    ("target", "next_command"),
    [
        ("rtx:sm89", "pip install --upgrade tensorrt-rtx"),
        ("trt", "pixtral build {bundle} --target trt --compat trt10.3; pip install --upgrade tensorrt"),
    ],
)
def test_a_tensorrt_too_old_for_an_operator_is_named_with_the_way_out(
    target: str, next_command: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real importer meets an operator that it does not know, as TensorRT 10.3 does with Attention."""
    path = copy.graph_path("vision")
    graph = onnx.load(path, load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "Attention")
    node.op_type = "AttentionOfTomorrow"
    onnx.save(graph, path)
    seal_again(copy.path)
    if target == "trt":
        monkeypatch.setitem(sys.modules, "tensorrt", RTX)
        monkeypatch.setattr(RTX, "__name__", "tensorrt")
    refused = invoke("build", copy.path, "--target", target)
    assert refused.exit_code == 4, refused.stderr
    assert "is too old for" in flat(refused) and f"'{node.name}'" in flat(refused)
    assert "does not know AttentionOfTomorrow" in flat(refused)
    assert next_command.format(bundle=copy.path) in flat(refused)


def test_a_wrong_target_lists_the_right_ones(copy: Bundle) -> None:
    for command in (("build", copy.path, "--target", "rtx:sm90"), ("check", copy.path, "--engine", "rtx:sm90")):
        refused = invoke(*command)
        assert refused.exit_code == 3
        assert "no target 'rtx:sm90'" in flat(refused)
        assert "--target rtx:sm75|rtx:sm80|rtx:sm86|rtx:sm89|rtx:sm120|rtx:sm121|trt" in flat(refused)


def test_too_little_memory_or_disk_says_how_much_there_must_be(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "available_memory_bytes", lambda: 900_000_000)
    refused = invoke("build", copy.path, "--target", "rtx:sm89")
    assert refused.exit_code == 4
    assert "takes some 1.0 GB of memory, 0.9 GB are available" in flat(refused)
    assert "--precision int4" in flat(refused)
    monkeypatch.setattr(building, "available_memory_bytes", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused = invoke("build", copy.path, "--target", "rtx:sm89")
    assert refused.exit_code == 4 and "GB of disk" in flat(refused) and "df -h" in flat(refused)
    assert not open_bundle(copy.path).engines


def flat(done: Result) -> str:
    """What was said, without the line breaks of the terminal's width."""
    return done.stderr.replace("\n", " ")
