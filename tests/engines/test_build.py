"""`pixtral build`: real engines of every precision without a GPU, and no engine of something else than the bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner, Result

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_engines import build as building
from pixtral_engines.build import BuildSettings, build
from pixtral_engines.build_plan import plan_build
from pixtral_engines.plan_judgement import judge_decoder
from pixtral_engines.profiles import Shapes, profiles
from pixtral_engines.targets import TARGETS, parse_targets
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.trt_package import import_tensorrt, version_of
from pixtral_runtime.bundle.engine_list import open_engines
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import InputError, MachineError, OtherGpuError, StaleEngineError
from pixtral_runtime.files import sha256_of_file

VERSION = version_of(import_tensorrt("rtx"))
SETTINGS = {
    "float16": ExportSettings(),
    "bfloat16": ExportSettings(dtype="bfloat16"),
    "int8": ExportSettings(precision="int8"),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn"),
    "fp8": ExportSettings(precision="fp8", method="rtn"),
    "nvfp4": ExportSettings(precision="nvfp4", method="rtn"),
}
BUILT = {"fp8": ("rtx:sm89",), "nvfp4": ("rtx:sm120",), "float16": ("rtx:sm75", "rtx:sm121")}
"""For the others SM86. Every GPU of every recipe, at the 12B's widths: `scripts/check_engines.py`."""
JUDGED = ("rtx:sm80", "rtx:sm86", "rtx:sm89", "rtx:sm120")
SHAPES = Shapes(context=256, batch=2, chunk=64)
SHORT = ExportSettings(max_context=512)


def built(bundle: Bundle, target: str, progress: Callable[[str, int, int], None] = lambda *_: None) -> Bundle:
    return build(bundle, plan_build(bundle, TARGETS[target], SHAPES), BuildSettings(), progress)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("plain") / "b", SHORT)


@pytest.fixture(scope="module")
def ready(plain: Bundle) -> Bundle:
    """With engines for one target."""
    return built(plain, "rtx:sm89")


@pytest.fixture
def copy(ready: Bundle, tmp_path: Path) -> Bundle:
    """Engines that a test may spoil."""
    shutil.copytree(ready.path, tmp_path / "b")
    return open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_recipe_builds_for_a_gpu_that_has_its_types(name: str, tmp_path: Path) -> None:
    bundle = exported(DEMO, tmp_path / "b", SETTINGS[name])
    targets = BUILT.get(name, ("rtx:sm86",))
    for target in targets:
        bundle = built(bundle, target)
    again = open_bundle(bundle.path)
    assert again == bundle
    assert sorted(again.engines) == sorted(targets)
    for target in again.engines:
        engines = open_engines(again, target, VERSION)
        assert (engines.precision, engines.context, engines.batch) == (bundle.precision, 256, 2)
        for graph in GRAPHS:
            path = bundle.path / engines.graphs[graph].file
            assert engines.graphs[graph].sha256 == sha256_of_file(path)
            assert path.stat().st_size == engines.graphs[graph].bytes > 100_000
        if target in JUDGED:
            judged = judge_decoder(again, engines, import_tensorrt("rtx"))
            kinds = {fault.kind for fault in judged.faults}
            assert kinds == ({"widens a weight by itself"} if name == "nvfp4" else set()), judged.faults
            assert judged.passed == (name != "nvfp4"), judged.moved_share


@pytest.mark.parametrize(
    ("names", "least"), [("sm90", "rtx:sm89"), ("rtx:sm89,rtx:sm52", "rtx:sm120"), ("", "rtx:sm75"), ("cuda", "trt")]
)
def test_a_wrong_target_lists_the_right_ones(names: str, least: str) -> None:
    with pytest.raises(InputError, match="no target") as caught:
        parse_targets(names)
    assert least in caught.value.hint


def test_a_gpu_without_the_type_is_refused_before_any_work(plain: Bundle) -> None:
    for precision, target in (("fp8", "rtx:sm86"), ("nvfp4", "rtx:sm89")):
        with pytest.raises(InputError, match=f"{target} does not compute in {precision}") as caught:
            plan_build(replace(plain, precision=precision), TARGETS[target], SHAPES)
        assert "rtx:sm120" in caught.value.hint
    with pytest.raises(InputError, match="no float32"):
        plan_build(replace(plain, dtype="float32", precision="float32"), TARGETS["rtx:sm89"], SHAPES)
    with pytest.raises(InputError, match="no int8 cache that is smaller or faster"):
        plan_build(replace(plain, kv_cache="int8"), TARGETS["rtx:sm89"], SHAPES)


def test_tensorrt_itself_refuses_the_same(plain: Bundle, tmp_path: Path) -> None:
    """Otherwise the table of types would be what stands between users and a working engine."""
    bundle = exported(DEMO, tmp_path / "b", SETTINGS["fp8"])
    plan = replace(plan_build(bundle, TARGETS["rtx:sm89"], SHAPES), target=TARGETS["rtx:sm86"])
    with pytest.raises(InputError, match=r"cannot build vision for rtx:sm86: .*fp8"):
        build(bundle, plan, BuildSettings(), lambda *_: None)


def test_a_graph_whose_input_tensorrt_drops_is_not_built(copy: Bundle) -> None:
    """`nonpad_kv_seqlen`: it parses, builds, and would attend to stale rows."""
    model = onnx.load(copy.graph_path("decoder"), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    model.graph.node.insert(0, helper.make_node("Add", ["write_index", "write_index"], ["lengths"], "lengths"))
    attention.input[:] = [*attention.input[:3], "", "", "", "lengths"]
    onnx.save(model, copy.graph_path("decoder"))
    with pytest.raises(InputError, match=f"drops the input 'lengths' of node '{attention.name}'"):
        built(copy, "rtx:sm89")


def test_engines_of_another_graph_or_another_tensorrt_are_refused(copy: Bundle) -> None:
    open_engines(copy, "rtx:sm89", VERSION)
    other = replace(copy.files["vision.onnx"], sha256="0" * 64)
    changed = replace(copy, files=copy.files | {"vision.onnx": other})
    with pytest.raises(StaleEngineError, match=r"built from another vision graph") as caught:
        open_engines(changed, "rtx:sm89", VERSION)
    assert caught.value.hint == f"pixtral build {copy.path} --target rtx:sm89"
    with pytest.raises(StaleEngineError, match=r"built by tensorrt_rtx .*, here is tensorrt_rtx 1\.2"):
        open_engines(copy, "rtx:sm89", "tensorrt_rtx 1.2")
    with pytest.raises(OtherGpuError, match=r"no engines for rtx:sm120; there are: rtx:sm89"):
        open_engines(copy, "rtx:sm120", VERSION)


def test_a_changed_or_missing_engine_file_is_refused(copy: Bundle) -> None:
    path = copy.path / open_engines(copy, "rtx:sm89", VERSION).graphs["embed"].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"expected \d+: the file was changed"):
        open_engines(copy, "rtx:sm89", VERSION)
    path.unlink()
    with pytest.raises(InputError, match="it is missing"):
        open_engines(copy, "rtx:sm89", VERSION)


def test_a_build_that_is_stopped_leaves_the_engines_that_were_there_and_no_other(copy: Bundle) -> None:
    before = {path: path.read_bytes() for path in (copy.path / "engines").rglob("*") if path.is_file()}

    def interrupt(stage: str, done: int, total: int) -> None:
        if "decoder" in stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="rtx:sm89 decoder"):
        built(copy, "rtx:sm89", interrupt)
    assert {path: path.read_bytes() for path in (copy.path / "engines").rglob("*") if path.is_file()} == before
    assert open_bundle(copy.path) == copy


def test_a_rebuild_replaces_all_engines_at_once_and_leaves_no_old_one(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, at_that_moment = Bundle.write, []

    def late(bundle: Bundle) -> None:
        at_that_moment.append(all(path.is_file() for path in open_bundle(copy.path).own_files))
        write(bundle)
        at_that_moment.append(all(path.is_file() for path in open_bundle(copy.path).own_files))

    monkeypatch.setattr(Bundle, "write", late)
    plan = plan_build(copy, TARGETS["rtx:sm89"], replace(SHAPES, batch=1))
    mine = copy.path / plan.target.folder / "vision-mine.engine"
    mine.write_bytes(b"somebody else's")
    rebuilt = build(copy, plan, BuildSettings(), lambda *_: None)
    assert at_that_moment == [True, True]
    listed = {rebuilt.path / engine.file for engine in open_engines(rebuilt, "rtx:sm89", VERSION).graphs.values()}
    assert set((copy.path / "engines").rglob("*.*")) == listed | {mine}
    assert not listed & set(copy.own_files)


INTERRUPTED_IN_A_CALLBACK = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a shell put in the background ignores it
from pixtral_cli import main, output
stage = output.Bars.stage
def interrupted(self, name, done, total, note=""):
    if "embed" in name:
        os.kill(os.getpid(), signal.SIGINT)
        output.Bars.stage = stage
    stage(self, name, done, total, note)
output.Bars.stage = interrupted
main.main()
"""


def test_ctrl_c_stops_the_command_although_tensorrt_swallows_it(plain: Bundle, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    arguments = ["build", str(tmp_path / "b"), "--target", "rtx:sm89"]
    command = [sys.executable, "-c", INTERRUPTED_IN_A_CALLBACK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "interrupted" in done.stderr) == (130, True), done.stderr
    assert not list((tmp_path / "b" / "engines/rtx-sm89").iterdir())


def test_too_little_memory_or_disk_is_refused_before_any_work(plain: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "available_memory_bytes", lambda: 900_000_000)
    with pytest.raises(MachineError, match=r"takes some 1\.0 GB of memory, 0\.9 GB are available"):
        built(plain, "rtx:sm89")
    monkeypatch.setattr(building, "available_memory_bytes", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match="GB of disk"):
        built(plain, "rtx:sm89")


def test_a_full_disk_stops_the_build_with_its_own_error(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = building._writer

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "_writer", lambda package, stream: real(package, Full()))
    with pytest.raises(OSError, match="No space left"):
        built(copy, "rtx:sm120")
    assert "rtx:sm120" not in open_bundle(copy.path).engines


def test_profiles_serve_every_call_of_the_runtime(plain: Bundle) -> None:
    shapes = Shapes.of(plain, None, 3, 256)
    prefill, decode = profiles(plain, "decoder", shapes)
    assert prefill["B"] == (1, 1, 2) and prefill["T"][2] == 256 and decode["T"] == (1, 1, 1) and decode["B"][2] == 3
    assert prefill["C"] == decode["C"] == (shapes.context,) * 3
    for precision, most in (("float16", 2), ("int4", 1)):  # or weights are stored in two forms
        alone = profiles(replace(plain, precision=precision), "decoder", Shapes.of(plain, None, 1, 256))
        assert [one["B"] for one in alone] == [one["R"] for one in alone] == [(1, 1, most)] * 2
    patch, side = plain.model.vision.patch_size, plain.limits.max_image_side
    vision = profiles(plain, "vision", shapes)
    assert {one["H"][0] for one in vision} == {patch} and max(one["W"][2] for one in vision) == side
    sizes = [size for profile in vision for letter in "HW" for size in profile[letter]]
    assert all(size % patch == 0 for size in sizes)
    with pytest.raises(InputError, match="more than the bundle's 512"):
        Shapes.of(plain, 513, 1, 256)
    for name, numbers in {"context": (0, 1, 256), "batch": (None, 0, 256), "chunk": (None, 1, -1)}.items():
        with pytest.raises(InputError, match=f"{name} is"):
            Shapes.of(plain, *numbers)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_builds_says_what_and_inspect_lists_it(copy: Bundle) -> None:
    dry = invoke("build", copy.path, "--target", "rtx:sm120", "--context", 256, "--dry-run", "--json")
    assert dry.exit_code == 0 and not json.loads(dry.stdout)["built"]
    assert list(open_bundle(copy.path).engines) == ["rtx:sm89"]
    done = invoke("build", copy.path, "--target", "rtx:sm120", "--context", 256, "--opt-level", 0, "--json")
    summary: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == 0 and summary["built"]
    sizes = summary["targets"][0]["engine_bytes"]
    listed = json.loads(invoke("inspect", copy.path, "--json").stdout)["engines"]
    assert {graph: entry["bytes"] for graph, entry in listed["rtx:sm120"]["graphs"].items()} == sizes
    assert "rtx:sm89" in listed
    assert invoke("build", copy.path, "--target", "sm52").exit_code == 3
    other = invoke("build", copy.path, "--target", "rtx:sm89", "--compat", "trt8")
    assert other.exit_code == 3 and "--compat trt10.3" in other.stderr
    trt_missing = invoke("build", copy.path, "--target", "trt")
    assert trt_missing.exit_code == 4 and "pixtral[tensorrt]" in trt_missing.stderr


def test_export_builds_in_one_command(tmp_path: Path) -> None:
    wrong = invoke("export", DEMO, "-o", tmp_path / "b", "--build", "sm52")
    assert wrong.exit_code == 3 and not (tmp_path / "b").exists()
    done = invoke("export", DEMO, "-o", tmp_path / "b", "--max-context", 256, "--build", "rtx:sm89", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["engines"][0]["target"] == "rtx:sm89"
    open_engines(open_bundle(tmp_path / "b"), "rtx:sm89", VERSION)
