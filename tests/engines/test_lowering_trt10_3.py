"""`--compat trt10.3`: graphs without the operators of opset 22 and later compute what the portable ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from helpers.bundles import exported
from helpers.networks import RTX, interpret, make_model, run_in_onnx_runtime
from helpers.places import DEMO
from pixtral_engines.build import BuildSettings, build
from pixtral_engines.build_plan import plan_build
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.lowered_graph import lower
from pixtral_engines.lowering_trt10_3 import COMPAT, lower_for_trt10_3
from pixtral_engines.network import parse_graph
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.errors import InputError

ROWS = 24
SETTINGS = {
    "float32": ExportSettings(dtype="float32"),
    "float16": ExportSettings(),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn", dtype="float32"),
    "int8": ExportSettings(precision="int8", dtype="float32"),
    "fp8": ExportSettings(precision="fp8", method="rtn", dtype="float32"),
}
TOLERANCE = {
    "float32": 1e-4,  # seen 1.4e-6
    "float16": 1e-2,  # seen 8.1e-4
    "int4": 1e-4,  # seen 6.7e-7
    "int8": 3e-2,  # seen 1.4e-7, more where one value rounds to the other side of its step; so the next two
    "fp8": 0.1,  # seen 2.0e-7
}
"""Of the largest value, in ONNX Runtime."""
HALF = {
    "float16": (ExportSettings(), 1e-2),  # seen 1.8e-3
    "int4": (ExportSettings(precision="int4", group_size=32, method="rtn"), 1e-2),  # seen 1.8e-3
    "int8": (ExportSettings(precision="int8"), 0.2),  # seen 5.1e-2: float16 rounds codes the other way
    "fp8": (ExportSettings(precision="fp8", method="rtn"), 0.2),  # seen 7.0e-2
}
"""What TensorRT's attention computes in, and the tolerance for the parsed network."""
OPERATORS = {
    "Add", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Expand", "Gather", "Gelu", "GreaterOrEqual",
    "LessOrEqual", "MatMul", "Mul", "QuantizeLinear", "Range", "ReduceMean", "Reshape", "ScatterElements", "Shape",
    "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SETTINGS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    return request.param, exported(DEMO, tmp_path_factory.mktemp("bundle") / "b", SETTINGS[request.param])


def calls(bundle: Bundle) -> dict[str, list[dict[str, Array]]]:
    """Odd sizes and two images a batch; prefill of two slots at their own rows of a cache that held something."""
    random = np.random.default_rng(0)
    patch, decoder = bundle.model.vision.patch_size, bundle.model.decoder

    def floats(*shape: int) -> Array:
        return random.standard_normal(shape).astype(bundle.dtype)

    steps = []
    for tokens, start in ((5, np.array([0, 7])), (1, np.array([5, 12]))):
        cache = {}
        for past, _ in bundle.graph_spec("decoder").caches:
            shape = (2, decoder.n_kv_heads, ROWS, decoder.head_dim)
            codes = random.integers(-127, 128, shape).astype(np.int8)
            cache[past.name] = codes if past.dtype == "int8" else floats(*shape)
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
    model = lower(bundle.graph_path(graph), ROWS, compat=True).model
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
            assert max(errors.values()) <= TOLERANCE[name], (graph, errors)


def test_lowered_graphs_hold_nothing_newer_than_opset_21(named: tuple[str, Bundle]) -> None:
    _, bundle = named
    for graph in GRAPHS:
        model = onnx.load_from_string(lowered(bundle, graph))
        assert (model.opset_import[0].version, model.ir_version) == (21, 10)
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        onnx.checker.check_model(model, full_check=True)


def test_chunks_and_decode_over_stale_rows_keep_agreeing(named: tuple[str, Bundle]) -> None:
    """Each form continues its own cache: two chunks, then two steps, of two slots that are not equally far."""
    name, bundle = named
    random = np.random.default_rng(1)
    first = calls(bundle)["decoder"][0]
    sources: tuple[bytes | Path, ...] = (bundle.graph_path("decoder"), lowered(bundle, "decoder"))
    pairs = bundle.graph_spec("decoder").caches
    caches = [{past.name: first[past.name] for past, _ in pairs}] * 2
    start = np.array([0, 7])
    for tokens in (5, 3, 1, 1):
        feeds = {
            "hidden": random.standard_normal((2, tokens, bundle.model.decoder.dim)).astype(bundle.dtype),
            "position_ids": start[:, None] + np.arange(tokens),
            "write_index": start,
            "logits_index": np.arange(2 * tokens),
        }
        runs = [run_in_onnx_runtime(source, feeds | cache) for source, cache in zip(sources, caches, strict=True)]
        assert relative_error(runs[1]["logits"], runs[0]["logits"]) <= TOLERANCE[name], tokens
        caches = [{past.name: run[present.name] for past, present in pairs} for run in runs]
        start = start + tokens


def test_rows_that_no_position_reaches_are_not_looked_at(named: tuple[str, Bundle]) -> None:
    _, bundle = named
    model, call = lowered(bundle, "decoder"), calls(bundle)["decoder"][0]
    other = dict(call)
    for past, _ in bundle.graph_spec("decoder").caches:
        other[past.name] = call[past.name].copy()
        other[past.name][:, :, 12:] = 99
    np.testing.assert_array_equal(
        run_in_onnx_runtime(model, call)["logits"], run_in_onnx_runtime(model, other)["logits"]
    )


@pytest.mark.parametrize("name", list(HALF))
def test_tensorrt_understands_them_alike_and_builds_them(name: str, tmp_path: Path) -> None:
    settings, tolerance = HALF[name]
    bundle = exported(DEMO, tmp_path / "b", settings)
    for graph, feeds in calls(bundle).items():
        parsed = parse_graph(bundle, graph, RTX, ROWS, compat=True)
        for call in feeds:
            expected = run_in_onnx_runtime(bundle.graph_path(graph), call)
            seen = Interpreter(parsed.network, RTX, keep=parsed).run(call)
            errors = {key: relative_error(seen[key], value) for key, value in expected.items()}
            assert max(errors.values()) <= tolerance, (graph, errors)
    plan = plan_build(bundle, TARGETS["rtx:sm89"], Shapes(ROWS, 2, 16))
    built = build(bundle, plan, BuildSettings(optimization_level=0, compat=COMPAT), lambda *_: None)
    assert set(built.engines["rtx:sm89"]["graphs"]) == set(GRAPHS)


def test_only_int4_weights_are_left_in_blocks(named: tuple[str, Bundle]) -> None:
    """TensorRT's operator page for Dequantize, 10.1: block quantization is "supported for DataType::kINT4 only"."""
    name, bundle = named
    for graph in GRAPHS:
        model = lower(bundle.graph_path(graph), ROWS, compat=True).model
        kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        blocked = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and ranks[n.input[1]] > 1]
        expected = {TensorProto.INT4} if bundle.precision == "int4" and graph == "decoder" else set()
        assert {kinds[node.input[0]] for node in blocked} == expected, (name, graph)


def half(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


ATTENTION = {"q": half(2, 4, 3, 8), "k": half(2, 2, 16, 8), "v": half(2, 2, 16, 8)}
ROTATION = {"x": half(2, 4, 3, 8), "cos": half(20, 4), "sin": half(20, 4), "at": np.array([[1, 2, 3], [7, 8, 9]])}


def test_the_scale_of_an_attention_is_heeded_and_names_lead_back() -> None:
    model = make_model([helper.make_node("Attention", list(ATTENTION), ["y"], "attend", scale=0.7)], ATTENTION, ["y"])
    expected = run_in_onnx_runtime(model.SerializeToString(), ATTENTION)["y"]
    lower_for_trt10_3(model)
    seen = run_in_onnx_runtime(model.SerializeToString(), ATTENTION)["y"]
    assert relative_error(seen, expected) < 5e-3  # seen 9e-4
    assert all(node.name.startswith("attend.") for node in model.graph.node)


def test_a_masked_attention_in_bfloat16_agrees_with_float32() -> None:
    """As TensorRT understands it; ONNX Runtime has no kernels for bfloat16."""
    mask = {"mask": (np.arange(16) <= np.array([2, 9])[:, None, None, None]).repeat(3, 2)}
    node = helper.make_node("Attention", [*ATTENTION, "mask"], ["y"], "attend")
    wide = {key: value.astype(np.float32) for key, value in ATTENTION.items()} | mask
    narrow = {key: value.astype("bfloat16") for key, value in ATTENTION.items()} | mask
    expected = run_in_onnx_runtime(make_model([node], wide, ["y"]).SerializeToString(), wide)["y"]
    model = make_model([node], narrow, ["y"])
    lower_for_trt10_3(model)
    assert relative_error(interpret(model, narrow)["y"], expected) < 3e-2  # seen 4.5e-3


@pytest.mark.parametrize(
    ("node", "feeds", "what"),
    [
        (helper.make_node("Attention", list(ATTENTION), ["y"], "a", is_causal=1), ATTENTION, "is_causal"),
        (helper.make_node("Attention", list(ATTENTION), ["y"], "a", softcap=1.0), ATTENTION, "softcap"),
        (helper.make_node("RotaryEmbedding", list(ROTATION), ["y"], "r", interleaved=1), ROTATION, "interleaved"),
        (helper.make_node("Swish", ["x"], ["y"], "s"), {"x": half(3, 8)}, "Swish"),
    ],
)
def test_what_a_replacement_would_lose_is_refused(node: onnx.NodeProto, feeds: dict[str, Array], what: str) -> None:
    with pytest.raises(InputError, match=f"no form for TensorRT 10.3 of .*{what}"):
        lower_for_trt10_3(make_model([node], feeds, ["y"]))


def test_float4_is_refused(tmp_path: Path) -> None:
    bundle = exported(DEMO, tmp_path / "b", ExportSettings(precision="nvfp4", method="rtn"))
    with pytest.raises(InputError, match="no float4") as caught:
        lower(bundle.graph_path("decoder"), ROWS, compat=True)
    assert "--precision int4" in caught.value.hint
