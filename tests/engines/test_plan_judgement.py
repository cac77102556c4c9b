"""What TensorRT-RTX compiled: the listing finds what was planted, and refuses to read what it does not know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.bundles import exported
from helpers.places import DATA, DEMO
from pixtral_engines import lowered_graph
from pixtral_engines.compiled_plan import read_programs, refuse_unknown_version
from pixtral_engines.network import parse_model
from pixtral_engines.plan_judgement import PlanJudgement, judge, plan_faults
from pixtral_engines.profiles import Shapes, profiles, ranges
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.candidates import with_candidates
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.engine_list import Engine
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import EngineError

RTX = import_tensorrt("rtx")
SHAPES = Shapes(context=512, batch=2, chunk=64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    settings = ExportSettings(precision="int4", group_size=32, method="rtn")  # one block of 128 would be the whole row
    return exported(DEMO, tmp_path_factory.mktemp("int4") / "b", settings)


def compiled(bundle: Bundle, path: Path, change: Any = lambda model: None) -> PlanJudgement:
    """The decoder's plan for SM89, of its lowered graph with a change."""
    lowered = lowered_graph.lower(bundle.graph_path("decoder"), SHAPES.context)
    change(lowered.model)
    parsed = parse_model(lowered.model, bundle.graph_path("decoder"), RTX, lowered.made)
    config = parsed.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(RTX.ComputeCapability.SM89, 0)
    wanted = profiles(bundle, "decoder", SHAPES)
    for sizes in wanted:
        profile = parsed.builder.create_optimization_profile()
        for tensor in with_candidates(bundle, "decoder").inputs:
            profile.set_shape(tensor.name, *ranges(tensor, sizes))
        config.add_optimization_profile(profile)
    path.write_bytes(parsed.builder.build_serialized_network(parsed.network, config))
    listed = [{letter: list(sizes) for letter, sizes in profile.items()} for profile in wanted]
    return judge(bundle, read_programs(path), Engine(path.name, 0, "", "", listed), SHAPES.context)


def test_a_step_moves_what_it_must(bundle: Bundle, tmp_path: Path) -> None:
    judged = compiled(bundle, tmp_path / "decoder.engine")
    assert judged.passed and judged.moved_share >= 1, judged.faults
    read = {tensor.name for kernel in judged.decode.kernels for tensor in kernel.reads}
    assert {name for pair in bundle.graph_spec("decoder").caches for name in (pair[1].name,)} <= read
    assert judged.prefill is not None and judged.prefill.profile != judged.decode.profile
    nodes = {node.name for node in onnx.load(bundle.graph_path("decoder"), load_external_data=False).graph.node}
    products = [kernel for kernel in judged.decode.kernels if kernel.is_product]
    assert all(nodes & set(kernel.layers) or "halves" in "".join(kernel.layers) for kernel in products)


def test_a_head_in_int8_blocks_is_found(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_graph, "halve_codes", lambda *_: {})
    judged = compiled(bundle, tmp_path / "decoder.engine")
    assert not judged.passed and {fault.kind for fault in judged.faults} == {"widens a weight by itself"}
    assert all("output.weight" in str(fault) for fault in judged.faults)


def test_query_heads_below_each_other_are_found(tmp_path: Path) -> None:
    """The program of a decode step of two layers of the 12B's width, as TensorRT-RTX 1.7.1 wrote it into a plan."""
    text = (DATA / "tensorrt_rtx-1.7.1-folded-heads.txt").read_bytes()
    (tmp_path / "decoder.engine").write_bytes(bytes(100) + text + bytes(100))
    (program,) = read_programs(tmp_path / "decoder.engine")
    assert program.profile == 1 and len(program.kernels) == 31
    faults = list(plan_faults(program, 8 * 1024 * 128 * 2))
    copies = [fault for fault in faults if fault.kind == "copies the cache"]
    assert [fault.layers for fault in copies] == [(f"layers.{n}.node__symbolic_9",) for n in (0, 0, 1, 1)]
    assert {fault.kind for fault in faults} == {"copies the cache", "attends as a product of matrices"}
    assert all(fault.bytes >= 2 * 8 * 1024 * 128 * 2 for fault in copies)


def test_an_island_of_float32_is_found(bundle: Bundle, tmp_path: Path) -> None:
    def widen(model: onnx.ModelProto) -> None:
        """The last layer's down projection computes in float32, with an input that float16 cannot hold."""
        product = [node for node in model.graph.node if node.op_type == "MatMul" and "dequantize" in node.input[1]][-1]
        place = list(model.graph.node).index(product)
        model.graph.initializer.append(numpy_helper.from_array(np.array(1.0001, np.float32), "factor"))
        nodes = [helper.make_node("Cast", [name], [f"{name}_wide"], f"{name}_wide", to=1) for name in product.input]
        x, weight = (cast.output[0] for cast in nodes)
        nodes += [
            helper.make_node("Mul", [x, "factor"], ["scaled"], "scaled"),
            helper.make_node("MatMul", ["scaled", weight], ["island"], product.name),
            helper.make_node("Cast", ["island"], product.output, "island", to=TensorProto.FLOAT16),
        ]
        model.graph.node.remove(product)
        for new in reversed(nodes):
            model.graph.node.insert(place, new)

    judged = compiled(bundle, tmp_path / "decoder.engine", widen)
    assert not judged.passed and "computes in float32" in {fault.kind for fault in judged.faults}


@pytest.mark.parametrize(("name", "version"), [("tensorrt_rtx", "1.8.0.1"), ("tensorrt", "11.4.0.106")])
def test_plans_of_another_tensorrt_are_not_judged(name: str, version: str) -> None:
    package: Any = SimpleNamespace(__name__=name, __version__=version)
    with pytest.raises(EngineError, match=f"what {name} {version} compiles is not known"):
        refuse_unknown_version(package)


def test_a_file_without_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"ftrt" + bytes(1000))
    with pytest.raises(EngineError, match="holds no program"):
        read_programs(tmp_path / "x.engine")
