"""Each layer that the interpreter knows, alone: against ONNX Runtime, or what the API says where ONNX has no such."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from helpers.networks import RTX, interpret, make_model, parse, run_in_onnx_runtime
from pixtral_engines import layer_semantics as layers
from pixtral_engines.arrays import weights_array
from pixtral_engines.attention_semantics import in_float16
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.tensors import UnknownLayer
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import log_of
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.errors import InputError

RANDOM = np.random.default_rng(0)
HALF = RANDOM.standard_normal((2, 4, 3, 8)).astype(np.float16)
KEYS = RANDOM.standard_normal((2, 2, 9, 8)).astype(np.float16)
TIES = np.array([[-1e4, -448, -128.5, -6.25, -2.5, -0.5, 0, 0.25], [0.5, 1.5, 2.5, 17, 29, 127.5, 460, 1e4]])
TABLE = np.cos(np.arange(5)[:, None] * np.ones(4)).astype(np.float16)


def codes(dtype: type, *shape: int) -> Array:
    return RANDOM.integers(-7, 8, shape).astype(np.float32).astype(dtype)


def scales(*shape: int) -> Array:
    return RANDOM.uniform(0.01, 1, shape).astype(np.float16)


NODES: dict[str, tuple[list[onnx.NodeProto], dict[str, Array], dict[str, Array]]] = {
    f"quantize {np.dtype(kind).name} to {np.dtype(code).name}": (
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"], "q"),
            helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], "d"),
        ],
        {"x": (TIES * 0.5).astype(kind)},
        {"s": np.array(0.5, kind), "z": np.zeros((), code)},
    )
    for kind in (np.float16, np.float32)
    for code in (np.int8, ml_dtypes.float8_e4m3fn)
} | {
    f"dequantize {np.dtype(code).name} {what}": (
        [
            helper.make_node("DequantizeLinear", ["c", "s"], ["d"], axis=axis, block_size=block),
            helper.make_node("Mul", ["x", "d"], ["y"], "use"),
        ],
        {"x": np.ones((6, 4), np.float16)},
        {"c": codes(code, 6, 4), "s": scales(*shape)},
    )
    for code in (np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn)
    for what, shape, axis, block in (
        ("by column", (4,), 1, 0),
        ("by row", (6,), 0, 0),
        ("in blocks of 3 rows", (2, 4), 0, 3),
        ("in blocks of 2 columns", (6, 2), 1, 2),
    )
    if block or code is not ml_dtypes.int4
}  # fmt: skip
NODES |= {
    "attention, causal": (
        [helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)],
        {"q": HALF, "k": HALF[:, ::2], "v": HALF[:, 1::2]},
        {},
    ),
    "attention, added mask and scale": (
        [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], scale=0.7)],
        {"q": HALF, "k": KEYS, "v": KEYS, "m": RANDOM.standard_normal((1, 4, 3, 9)).astype(np.float16)},
        {},
    ),
    "attention, mask of a slot": (
        [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])],
        {"q": HALF, "k": KEYS, "v": KEYS, "m": np.arange(9) <= np.arange(6).reshape(2, 1, 3, 1)},
        {},
    ),
    "rotary embedding of neighbours": (
        [helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "p"], ["y"], interleaved=1)],
        {"x": HALF, "p": RANDOM.integers(0, 5, (2, 3))},
        {"cos": TABLE, "sin": TABLE[::-1].copy()},
    ),
    "rotary embedding of a part": (
        [helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "p"], ["y"], rotary_embedding_dim=4, num_heads=4)],
        {"x": HALF, "p": RANDOM.integers(0, 5, (2, 3))},
        {"cos": TABLE[:, :2].copy(), "sin": TABLE[::-1, :2].copy()},
    ),
    "overlapping convolution": (
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 1])],
        {"x": HALF},
        {"w": RANDOM.standard_normal((5, 4, 2, 3)).astype(np.float16), "b": HALF[0, 0, 0, :5].copy()},
    ),
    "exact gelu": ([helper.make_node("Gelu", ["x"], ["y"])], {"x": HALF}, {}),
}  # fmt: skip
NODE_TOLERANCE = 5e-3  # float16; seen 1.9e-3


@pytest.mark.parametrize("case", NODES)
def test_single_nodes_agree(case: str) -> None:
    """More strictly than whole graphs can: quantizing to the last bit."""
    nodes, feeds, constants = NODES[case]
    model = make_model(nodes, feeds, ["y"], **constants)
    seen, expected = interpret(model, feeds)["y"], run_in_onnx_runtime(model.SerializeToString(), feeds)["y"]
    assert seen.dtype == expected.dtype
    if "quantize" in case:
        np.testing.assert_array_equal(seen, expected)
    else:
        assert relative_error(seen, expected) < NODE_TOLERANCE


def test_every_float4_code_has_its_value() -> None:
    """Against the E2M1 table of the OCP Microscaling specification 1.0."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float16)
    values = np.concatenate([positive, -positive])
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["d"], "d", axis=0, block_size=16),
        helper.make_node("Mul", ["x", "d"], ["y"], "use"),
    ]
    feeds = {"x": np.ones((16, 2), np.float16)}
    table = np.stack([values, values[::-1]], 1)
    constants = {"c": table.astype(ml_dtypes.float4_e2m1fn), "s": np.array([[0.5, 3]], np.float16)}
    seen = interpret(make_model(nodes, feeds, ["y"], **constants), feeds)["y"]
    np.testing.assert_array_equal(seen, table * constants["s"])


def empty_network() -> tuple[object, RTX.INetworkDefinition]:  # type: ignore[name-defined]
    builder = RTX.Builder(log_of(RTX).logger)
    return builder, builder.create_network(1 << int(RTX.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


@pytest.mark.parametrize("kind", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"])
@pytest.mark.parametrize("lengths", [None, [3, 5]])
def test_attention_of_the_network_api(kind: str, lengths: list[int] | None) -> None:
    """What the ONNX importer does not make: causal kinds and lengths, against a loop over queries."""
    q, k = HALF.astype(np.float32), KEYS.astype(np.float32)[:, :, :5]
    builder, network = empty_network()
    feeds = {"q": q, "k": k, "v": k}
    tensors = [network.add_input(name, RTX.float32, value.shape) for name, value in feeds.items()]
    layer = network.add_attention_v2(*tensors, RTX.AttentionNormalizationOp.SOFTMAX, getattr(RTX.CausalMaskKind, kind))
    if lengths is not None:
        feeds["lengths"] = np.array(lengths, np.int32)
        layer.key_value_lengths = network.add_input("lengths", RTX.int32, (2,))
    network.mark_output(layer.get_output(0))
    (seen,) = Interpreter(network, RTX, keep=builder).run(feeds).values()
    for slot, head, token in np.ndindex(2, 4, 3):
        end = {"NONE": 5, "UPPER_LEFT": token + 1, "LOWER_RIGHT": token + 3}[kind]
        keys = k[slot, head // 2, : min([end, *(lengths or [])[slot : slot + 1]])]
        weights = np.exp(keys @ q[slot, head, token])
        np.testing.assert_allclose(seen[slot, head, token], weights @ keys / weights.sum(), rtol=1e-4, atol=1e-6)


def test_an_unknown_layer_is_named() -> None:
    builder, network = empty_network()
    layer = network.add_lrn(network.add_input("x", RTX.float32, (1, 2, 3, 4)), 1, 1.0, 1.0, 1.0)
    layer.name = "answer"
    with pytest.raises(UnknownLayer, match="the type LRN of layer 'answer'"):
        Interpreter(network, RTX, keep=builder)


def test_an_unknown_mode_is_named() -> None:
    model = make_model(
        [helper.make_node("GatherND", ["x", "i"], ["y"], "pick")], {"x": HALF, "i": np.array([[1]])}, ["y"]
    )
    with pytest.raises(UnknownLayer, match=r"the gather mode ND.* of layer 'pick'"):
        interpret(model, {"x": HALF, "i": np.array([[1]])})


def test_wrong_inputs_are_refused() -> None:
    feeds = {"x": HALF, "i": np.array([0, 1])}
    model = make_model([helper.make_node("Gather", ["x", "i"], ["y"], "rows")], feeds, ["y"])
    for changed, message in (
        ({"x": HALF}, r"takes \['i', 'x'\], not \['x'\]"),
        (feeds | {"x": HALF.astype(np.float32)}, "x is float32"),
        (feeds | {"x": HALF[:1]}, "x is float16 .* expected"),
        (feeds | {"i": np.array([0, 2])}, "layer 'rows' reads or writes rows 0 to 2 of 2"),
        (feeds | {"i": np.array([-1, 0])}, "rows -1 to 0 of 2"),
    ):
        with pytest.raises(InputError, match=message):
            interpret(model, changed)


def test_the_layer_that_overflows_is_found() -> None:
    nodes = [helper.make_node("Mul", [f"x{n}", "c"], [f"x{n + 1}"], f"times_{n}") for n in range(4)]
    feeds = {"x0": np.array([6], np.float16)}
    model = make_model(nodes, feeds, ["x4"], c=np.array([100], np.float16))
    finite: dict[str, bool] = {}
    interpreter_of(model).run(
        feeds, lambda layer, tensor, value: finite.update({layer: bool(np.isfinite(value).all())})
    )
    assert [layer for layer, whole in finite.items() if not whole] == ["times_2", "times_3"]


def interpreter_of(model: onnx.ModelProto, *, cache_constants: bool = False) -> Interpreter:
    parsed = parse(model)
    return Interpreter(parsed.network, RTX, keep=parsed, cache_constants=cache_constants)


def test_tensors_are_freed_after_their_last_use() -> None:
    x = np.ones((1 << 20,), np.float32)
    nodes = [helper.make_node("Add", [f"x{n}", f"x{n}"], [f"x{n + 1}"]) for n in range(20)]
    run = interpreter_of(make_model(nodes, {"x0": x}, ["x20"])).run
    tracemalloc.start()
    (y,) = run({"x0": x}).values()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert y[0] == 2**20 and peak < 3 * x.nbytes


def test_constants_are_computed_once_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(layer: object, inputs: list[Array], output: object) -> Array:
        nonlocal calls
        calls += 1
        return layers._dequantize(layer, inputs, output)  # type: ignore[arg-type]

    monkeypatch.setitem(layers.LAYERS, "DEQUANTIZE", ("IDequantizeLayer", counted))
    nodes, feeds, constants = NODES["dequantize int8 by row"]
    model = make_model(nodes, feeds, ["y"], **constants)
    for kept, expected in ((True, 1), (False, 3)):
        calls, run = 0, interpreter_of(model, cache_constants=kept).run
        results = [run(feeds)["y"] for _ in range(3)]
        assert calls == expected
        assert all((result == results[0]).all() for result in results)


def test_weights_of_every_size_are_read_from_tensorrts_memory() -> None:
    for value in (np.arange(5, dtype=np.float16), np.arange(5).astype(ml_dtypes.bfloat16)):
        kind = {"float16": RTX.float16, "bfloat16": RTX.bfloat16}[value.dtype.name]
        np.testing.assert_array_equal(weights_array(RTX.Weights(kind, value.ctypes.data, 5)), value)
    packed = np.array([0x21, 0xF8, 0x07], np.uint8)  # 1, 2, -8, -1, 7
    seen = weights_array(RTX.Weights(RTX.int4, packed.ctypes.data, 5))
    np.testing.assert_array_equal(seen.astype(np.int8), [1, 2, -8, -1, 7])


def test_attention_that_adds_up_in_float16_stops_growing() -> None:
    """Above 32,768 float16 has every 32nd number: 16 more are lost. Small sums of integers are exact."""
    rows = 40_000
    np.testing.assert_array_equal(in_float16(np.ones((1, rows)), np.ones((rows, 1))), [[32_768]])
    a, b = (np.random.default_rng(seed).integers(-3, 4, (8, 40)).astype(np.float32) for seed in (0, 1))
    np.testing.assert_array_equal(in_float16(a, b.T), a @ b.T)
    builder, network = empty_network()
    feeds = {"q": np.zeros((1, 1, 1, 8)), "k": np.ones((1, 1, rows, 8)), "v": np.ones((1, 1, rows, 8))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    tensors = [network.add_input(name, RTX.float32, value.shape) for name, value in feeds.items()]
    layer = network.add_attention_v2(*tensors, RTX.AttentionNormalizationOp.SOFTMAX, RTX.CausalMaskKind.NONE)
    network.mark_output(layer.get_output(0))
    for rounded, expected in ((False, 1), (True, 32_768 / rows)):
        (seen,) = Interpreter(network, RTX, keep=builder, float16_attention=rounded).run(feeds).values()
        np.testing.assert_allclose(seen, expected, rtol=1e-6)
