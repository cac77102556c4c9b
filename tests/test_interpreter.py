"""What TensorRT understood of a bundle's graphs computes what ONNX Runtime computes."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from networks import RTX, interpret, make_model, parse, relative_error, run_in_onnx_runtime
from pixtral_engines import interpreter
from pixtral_engines.arrays import DTYPES, weights_array
from pixtral_engines.interpreter import Interpreter, UnknownLayer
from pixtral_engines.network import parse_graph
from pixtral_export.checkpoint import open_checkpoint
from pixtral_export.export import ExportSettings, export, plan_export
from pixtral_runtime import Model, load
from pixtral_runtime.bundle import Bundle
from pixtral_runtime.errors import InputError
from pixtral_runtime.generate import Sessions
from pixtral_runtime.session import Array, Buffer, KVCache
from pixtral_runtime.spec import GRAPHS
from pixtral_runtime.trt_package import log_of

CHECKPOINT = Path(__file__).parent / "data" / "tiny-pixtral"
IMAGES = Path(__file__).parent / "data" / "images"
ROWS = 16  # of the cache
SETTINGS = {
    "float16": ExportSettings(),
    "bfloat16": ExportSettings(dtype="bfloat16"),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn"),
    "nvfp4": ExportSettings(precision="nvfp4", method="rtn"),
    "int8": ExportSettings(precision="int8"),
    "int8 in float32": ExportSettings(precision="int8", dtype="float32"),
    "fp8 in float32": ExportSettings(precision="fp8", dtype="float32"),
    "int8 cache in float32": ExportSettings(kv_cache="int8", dtype="float32"),
}
TOLERANCE = {
    "float16": 6e-3,  # seen 2.6e-3
    "bfloat16": 4e-2,  # seen 1.0e-2, against float16
    "int4": 6e-3,  # seen 1.4e-3
    "nvfp4": 6e-3,  # seen 1.4e-3
    "int8": 0.2,  # seen 7.3e-2: where float16 rounds an activation the other way, its code moves a whole step
    "int8 in float32": 3e-2,  # seen 9.4e-7, and 9e-3 where one such step remains
    "fp8 in float32": 1e-4,  # seen 1.1e-6
    "int8 cache in float32": 1e-4,  # seen 2.5e-6
}
"""Share of a tensor's largest magnitude."""


def exported(name: str, target: Path) -> Bundle:
    checkpoint = open_checkpoint(CHECKPOINT)
    settings = replace(SETTINGS[name], max_context=1024, calibration_samples=2)
    return export(checkpoint, plan_export(checkpoint, settings), target, force=False, progress=lambda *_: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Float16, the reference for dtypes that ONNX Runtime has no kernels for."""
    return exported("float16", tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module", params=list(SETTINGS))
def named_bundle(
    request: pytest.FixtureRequest, plain: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Bundle]:
    if request.param == "float16":
        return request.param, plain
    return request.param, exported(request.param, tmp_path_factory.mktemp("bundle") / "b")


def reference(name: str, bundle: Bundle, plain: Bundle, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
    """ONNX Runtime on the bundle's portable graph, not the one rewritten for TensorRT."""
    if name == "bfloat16":  # the checkpoint's own dtype: its weights lose nothing in float16
        narrow = {key: value.astype("float16") if value.dtype == "bfloat16" else value for key, value in feeds.items()}
        return run_in_onnx_runtime(plain.graph_path(graph), narrow)
    if name == "nvfp4":
        return run_in_onnx_runtime(dequantized(bundle.graph_path(graph)), feeds)
    return run_in_onnx_runtime(bundle.graph_path(graph), feeds)


def dequantized(path: Path) -> bytes:
    """A graph with its float4 weights, and their float8 scales, multiplied out beforehand."""
    model = onnx.load(path)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        codes, scale = (values.get(name) for name in node.input[:2]) if len(node.input) == 2 else (None, None)
        if codes is None or scale is None or codes.dtype not in ("float4_e2m1fn", "float8_e4m3fn"):
            continue
        repeats = 1 if scale.ndim == 0 else len(codes) // len(scale)
        wide = scale if scale.ndim == 0 else scale.repeat(repeats, 0)
        values[node.output[0]] = (codes.astype(np.float32) * wide.astype(np.float32)).astype(scale.dtype)
        model.graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
        model.graph.node.remove(node)
    return bytes(model.SerializeToString())


class Draw:
    """The same random inputs in whatever order tests run."""

    def __init__(self, bundle: Bundle) -> None:
        self._dtype, self._generator = bundle.dtype, np.random.default_rng(0)

    def floats(self, *shape: int) -> Array:
        return self._generator.standard_normal(shape).astype(self._dtype)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        return self._generator.integers(low, high, shape)


def test_vision_and_embed_agree_on_odd_sizes(named_bundle: tuple[str, Bundle], plain: Bundle) -> None:
    name, bundle = named_bundle
    patch, width, draw = bundle.model.vision.patch_size, bundle.model.decoder.dim, Draw(bundle)
    feeds: dict[str, list[dict[str, Array]]] = {
        "vision": [
            {"pixels": draw.floats(batch, 3, patch * rows, patch * columns)}
            for batch, rows, columns in ((2, 3, 5), (1, 1, 1), (1, 7, 2))
        ],
        "embed": [
            {
                "token_ids": draw.integers(0, 700, 2, tokens),
                "image_features": draw.floats(5, width),
                "feature_index": draw.integers(-1, 5, 2, tokens),
            }
            for tokens in (1, 7)
        ],
    }
    for graph, calls in feeds.items():
        parsed = parse_graph(bundle, graph, RTX, ROWS)
        assert not parsed.widened
        run = Interpreter(parsed.network, RTX, keep=parsed, cache_constants=True).run
        for call in calls:
            expected = reference(name, bundle, plain, graph, call)
            errors = {key: relative_error(value, expected[key]) for key, value in run(call).items()}
            assert errors and max(errors.values()) < TOLERANCE[name], (graph, errors)


def test_prefill_and_decode_steps_agree_over_a_cache(named_bundle: tuple[str, Bundle], plain: Bundle) -> None:
    """Two slots, each at its own row of a cache that held something before; every step starts from the reference's."""
    name, bundle = named_bundle
    parsed = parse_graph(bundle, "decoder", RTX, ROWS)
    assert not parsed.widened
    run = Interpreter(parsed.network, RTX, keep=parsed).run
    decoder, draw = bundle.model.decoder, Draw(bundle)
    shape = (2, decoder.n_kv_heads, ROWS, decoder.head_dim)
    cache: dict[str, Array] = {}
    for tensor in bundle.graph_spec("decoder").inputs:
        if tensor.name.startswith("past_"):
            is_coded = tensor.dtype == "int8"
            cache[tensor.name] = draw.integers(-127, 128, *shape).astype(np.int8) if is_coded else draw.floats(*shape)
    write_index = np.array([0, 4])
    for tokens in (5, 3, 1, 1):
        feeds = cache | {
            "hidden": draw.floats(2, tokens, decoder.dim),
            "position_ids": write_index[:, None] + np.arange(tokens),
            "write_index": write_index,
            "logits_index": np.array([tokens - 1, 2 * tokens - 1]),
        }
        seen, expected = run(feeds), reference(name, bundle, plain, "decoder", feeds)
        assert seen["logits"].dtype == np.float32
        errors = {key: relative_error(value, expected[key]) for key, value in seen.items()}
        assert len(errors) == 1 + len(cache) and max(errors.values()) < TOLERANCE[name], errors
        cache = {key: expected[key.replace("past", "present")].astype(value.dtype) for key, value in cache.items()}
        write_index = write_index + tokens


@dataclass
class HostBuffer:
    value: Array

    def numpy(self) -> Array:
        return self.value


@dataclass
class HostCache:
    tensors: dict[str, Array]

    @property
    def slots(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def rows(self) -> int:
        return int(next(iter(self.tensors.values())).shape[2])

    def reserve(self, rows: int) -> None:
        assert rows <= self.rows, "a network has a fixed number of cache rows"

    def layers(self) -> list[tuple[Array, Array]]:
        tensors = list(self.tensors.values())
        return list(zip(tensors[::2], tensors[1::2], strict=True))


class InterpreterSession:
    """The Session protocol over an interpreter."""

    def __init__(self, bundle: Bundle, graph: str, rows: int) -> None:
        parsed = parse_graph(bundle, graph, RTX, rows)
        self._interpreter = Interpreter(parsed.network, RTX, keep=parsed, cache_constants=True)

    def run(self, feeds: dict[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        past = cache.tensors if isinstance(cache, HostCache) else {}
        arrays = {key: value if isinstance(value, np.ndarray) else value.numpy() for key, value in feeds.items()}
        outputs = self._interpreter.run(arrays | past)
        for key in past:
            past[key] = outputs.pop(key.replace("past", "present"))
        return {key: HostBuffer(value) for key, value in outputs.items()}

    def new_cache(self, slots: int, rows: int) -> HostCache:
        return HostCache(
            {
                tensor.name: np.zeros((slots, *tensor.shape[1:]), DTYPES[tensor.dtype])
                for tensor in self._interpreter.inputs
                if tensor.name.startswith("past_")
            }
        )


def test_greedy_answers_are_those_of_onnx_runtime(plain: Bundle) -> None:
    ours = load(plain.path)
    sessions = Sessions(*(InterpreterSession(plain, graph, 512) for graph in GRAPHS))  # type: ignore[arg-type]
    theirs = Model(plain, sessions, ours.prompts)
    for question, images in (
        ("Describe this image in one short sentence.", ["gray_circle_99x70.png"]),
        ("what color is the shape in the second image?", ["red_triangle_64x64.png", "blue_circle_64x64.png"]),
        ("Describe this image in one short sentence.", []),
    ):
        paths = [IMAGES / image for image in images]
        a, b = (model.generate(question, paths, max_new_tokens=24) for model in (ours, theirs))
        assert a.token_ids == b.token_ids and len(a.token_ids) > 1


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
    layer = network.add_topk(network.add_input("x", RTX.float32, (2, 3)), RTX.TopKOperation.MAX, 1, 2)
    layer.name = "answer"
    with pytest.raises(UnknownLayer, match="the type TOPK of layer 'answer'"):
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
        return interpreter._dequantize(layer, inputs, output)  # type: ignore[arg-type]

    monkeypatch.setitem(interpreter.LAYERS, "DEQUANTIZE", ("IDequantizeLayer", counted))
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
