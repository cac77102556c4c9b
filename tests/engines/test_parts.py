"""Decoders in parts: cut where the bytes say, built within a small machine's memory, checked, judged and listed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from pixtral_cli.main import app
from pixtral_engines import build_plan
from pixtral_engines.build import BuildSettings, build
from pixtral_engines.build_plan import plan_build
from pixtral_engines.parts import even_cuts, part_bytes, specs_of, take_part
from pixtral_engines.plan_judgement import judge_decoder
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_runtime.backends.trt_package import import_tensorrt, version_of
from pixtral_runtime.bundle.engine_list import (
    Engine,
    EngineSet,
    listed_engines,
    open_engines,
    source_of,
    with_engines,
)
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.onnx_weights import ROPE_MARK, weight_bytes
from pixtral_runtime.errors import EngineError, SettingError

RTX = import_tensorrt("rtx")
SHAPES = Shapes(context=256, batch=2, chunk=64)
SM89 = TARGETS["rtx:sm89"]
FAST = BuildSettings(optimization_level=0)


def test_parts_have_about_as_many_bytes_and_every_weight_once(plain: Bundle) -> None:
    layers = plain.model.decoder.n_layers
    sizes = weight_bytes(plain.graph_path("decoder"))
    tables = sum(size for name, size in sizes.items() if ROPE_MARK in name)
    for parts in range(1, layers + 1):
        cuts = even_cuts(plain, parts)
        assert len(cuts) == parts - 1
        assert sum(part_bytes(plain, cuts)) == sum(sizes.values()) + (parts - 1) * tables
        specs = list(specs_of(plain, "decoder", cuts).values())
        assert [pair for spec in specs for pair in spec.caches] == list(plain.graph_spec("decoder").caches)
    assert even_cuts(plain, 2) == (2,)  # a layer is 0.9 MB, the head 0.5
    with pytest.raises(SettingError, match="3 layers cannot be built in 4 parts"):
        plan_build(plain, SM89, SHAPES, parts=4)


@pytest.mark.parametrize(("available", "parts"), [(10**12, 1), (1_000_000_001, 3), (None, 1)])
def test_a_small_machine_builds_in_as_many_parts_as_its_memory_asks_for(
    available: int | None, parts: int, plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "available_memory_bytes", lambda: available)
    plan = plan_build(plain, SM89, SHAPES)
    assert len(plan.cuts) + 1 == parts
    assert plan_build(plain, SM89, SHAPES, parts=2).cuts == (2,), "what the user says counts"


def test_a_graph_whose_layers_share_more_than_hidden_states_is_not_cut(plain: Bundle) -> None:
    model = onnx.load(plain.graph_path("decoder"), load_external_data=False)
    cuts = (1,)
    part = specs_of(plain, "decoder", cuts)["decoder.2"]
    first = next(node for node in model.graph.node if node.name.startswith("layers.0."))
    model.graph.node.append(helper.make_node("Identity", [first.output[0]], ["odd"], "layers.2.odd"))
    with pytest.raises(RuntimeError, match="layer 1 takes"):
        take_part(model, part, cuts)


def test_the_command_builds_parts_and_what_reads_engines_knows_them(copy: Bundle) -> None:
    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.stdout

    options = ("--target", SM89.name, "--context", 256, "--batch", 2, "--chunk", 64, "--opt-level", 0)
    built = json.loads(invoke("build", copy.path, *options, "--parts", 2, "--json"))
    names = ["vision", "embed", "decoder.1", "decoder.2"]
    assert built["parts"] == 2 and list(built["targets"][0]["engine_bytes"]) == names
    engines = open_engines(open_bundle(copy.path), SM89.name, version_of(RTX))
    assert engines.cuts == [2] and set(engines.graphs) == set(names)
    assert all(name in invoke("inspect", copy.path) for name in names)

    report = json.loads(invoke("check", copy.path, "--engine", SM89.name, "--json"))
    assert report["network"]["parts"] == 2 and all(seen["passed"] for seen in report["network"]["comparisons"])
    assert report["plans"][SM89.name]["passed"], report["plans"][SM89.name]["faults"]
    judged = judge_decoder(copy, engines, RTX)
    assert sum(kernel.is_attention for kernel in judged.decode.kernels) == copy.model.decoder.n_layers

    whole = build(open_bundle(copy.path), plan_build(copy, SM89, SHAPES), FAST, lambda *_: None)
    assert listed_engines(whole, SM89.name).cuts == []
    assert len(list((copy.path / SM89.folder).glob("*.engine"))) == 3, "the parts are gone"


@pytest.mark.parametrize(
    ("cuts", "names", "told"),
    [
        ([3], (), "cannot be cut at"),
        ([2, 1], (), "cannot be cut at"),
        ([1], ("decoder.1",), r"no decoder\.2 engine"),
        ([], ("decoder.1", "decoder.2"), "no decoder engine"),
        ([1], ("decoder.1", "decoder.2"), ""),
    ],
)
def test_a_list_of_parts_that_cannot_be_is_refused(
    cuts: list[int], names: tuple[str, ...], told: str, plain: Bundle
) -> None:
    file = plain.files["embed.onnx"]
    engines = {
        name: Engine("embed.onnx", file.bytes, file.sha256, source_of(plain, name.partition(".")[0]), [])
        for name in ("vision", "embed", *names)
    }
    shapes = (SHAPES.context, SHAPES.batch, SHAPES.chunk)
    listed = EngineSet(SM89.name, version_of(RTX), plain.precision, *shapes, engines, cuts=cuts)
    with pytest.raises(EngineError, match=told) if told else nullcontext():
        assert open_engines(with_engines(plain, listed), SM89.name, version_of(RTX)) == listed
