"""`--compat trt10.3`: graphs without the operators of opset 22 and later compute what the portable ones do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from networks import RTX, relative_error, run_in_onnx_runtime
from pixtral_engines.build import BuildSettings, build, plan_build
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import lower, parse_graph
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_export.checkpoint import open_checkpoint
from pixtral_export.export import ExportSettings, export, plan_export
from pixtral_runtime.bundle import Bundle
from pixtral_runtime.errors import InputError
from pixtral_runtime.session import Array
from pixtral_runtime.spec import GRAPHS

DEMO = Path(__file__).parent / "data" / "tiny-pixtral"
ROWS = 24
SETTINGS = {
    "float32": ExportSettings(dtype="float32"),
    "float16": ExportSettings(),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn", dtype="float32"),
    "int8": ExportSettings(precision="int8", dtype="float32"),
    "fp8": ExportSettings(precision="fp8", dtype="float32"),
    "int8 cache": ExportSettings(kv_cache="int8", dtype="float32"),
}
TOLERANCE = {"float16": 1e-2, "int8": 3e-2, "fp8": 0.1, "int8 cache": 2e-2}
"""Of the largest value; 1e-4 elsewhere. 8-bit recipes: one value that rounds to the other side of its step."""
OPERATORS = {
    "Add", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Expand", "Gather", "Gelu", "GreaterOrEqual",
    "LessOrEqual", "MatMul", "Mul", "QuantizeLinear", "Range", "ReduceMean", "Reshape", "ScatterElements", "Shape",
    "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def exported(name: str, target: Path) -> Bundle:
    checkpoint = open_checkpoint(DEMO)
    settings = replace(SETTINGS[name], max_context=512, calibration_samples=2)
    return export(checkpoint, plan_export(checkpoint, settings), target, force=False, progress=lambda *_: None)


@pytest.fixture(scope="module", params=list(SETTINGS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    return request.param, exported(request.param, tmp_path_factory.mktemp("bundle") / "b")


def calls(bundle: Bundle) -> dict[str, list[dict[str, Array]]]:
    """Odd sizes and two images a batch; prefill of two slots at their own rows of a cache that held something."""
    random = np.random.default_rng(0)
    patch, decoder = bundle.model.vision.patch_size, bundle.model.decoder

    def floats(*shape: int) -> Array:
        return random.standard_normal(shape).astype(bundle.dtype)

    steps = []
    for tokens, start in ((5, np.array([0, 7])), (1, np.array([5, 12]))):
        cache = {}
        for tensor in bundle.graph_spec("decoder").inputs:
            if tensor.name.startswith("past_"):
                shape = (2, decoder.n_kv_heads, ROWS, decoder.head_dim)
                codes = random.integers(-127, 128, shape).astype(np.int8)
                cache[tensor.name] = codes if tensor.dtype == "int8" else floats(*shape)
        positions = start[:, None] + np.arange(tokens)
        feeds = {"position_ids": positions, "write_index": start, "logits_index": np.arange(2 * tokens)}
        steps.append({"hidden": floats(2, tokens, decoder.dim), **feeds, **cache})
    return {
        "vision": [{"pixels": floats(b, 3, patch * r, patch * c)} for b, r, c in ((2, 3, 5), (1, 1, 1))],
        "embed": [
            {
                "token_ids": random.integers(0, 700, (2, 6)),
                "image_features": floats(4, decoder.dim),
                "feature_index": random.integers(-1, 4, (2, 6)),
            }
        ],
        "decoder": steps,
    }


def lowered(bundle: Bundle, graph: str) -> bytes:
    """With weights inside, for a session without a file."""
    model = lower(bundle.graph_path(graph), ROWS, compat=True)
    onnx.external_data_helper.load_external_data_for_model(model, str(bundle.path))
    return bytes(model.SerializeToString())


def test_lowered_graphs_compute_what_the_portable_ones_do(named: tuple[str, Bundle]) -> None:
    name, bundle = named
    for graph, feeds in calls(bundle).items():
        model = lowered(bundle, graph)
        for call in feeds:
            expected = run_in_onnx_runtime(bundle.graph_path(graph), call)
            seen = run_in_onnx_runtime(model, call)
            errors = {key: relative_error(seen[key], value) for key, value in expected.items()}
            assert max(errors.values()) <= TOLERANCE.get(name, 1e-4), (graph, errors)


def test_lowered_graphs_hold_nothing_newer_than_opset_21(named: tuple[str, Bundle]) -> None:
    _, bundle = named
    for graph in GRAPHS:
        model = onnx.load_from_string(lowered(bundle, graph))
        assert (model.opset_import[0].version, model.ir_version) == (21, 10)
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        onnx.checker.check_model(model, full_check=True)


def test_tensorrt_understands_them_alike_and_builds_them(tmp_path: Path) -> None:
    bundle = exported("float16", tmp_path / "b")
    for graph, feeds in calls(bundle).items():
        parsed = parse_graph(bundle, graph, RTX, ROWS, compat=True)
        for call in feeds:
            expected = run_in_onnx_runtime(bundle.graph_path(graph), call)
            seen = Interpreter(parsed.network, RTX, keep=parsed).run(call)
            assert all(relative_error(seen[key], value) <= 1e-2 for key, value in expected.items()), graph
    plan = plan_build(bundle, TARGETS["rtx:sm89"], Shapes(ROWS, 2, 16))
    built = build(bundle, plan, BuildSettings(compat=True), lambda *_: None)
    assert set(built.engines["rtx:sm89"]["graphs"]) == set(GRAPHS)


def test_float4_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEMO)
    settings = ExportSettings(precision="nvfp4", method="rtn", max_context=512)
    bundle = export(
        checkpoint, plan_export(checkpoint, settings), tmp_path / "b", force=False, progress=lambda *_: None
    )
    with pytest.raises(InputError, match="no float4"):
        lower(bundle.graph_path("decoder"), ROWS, compat=True)
