"""What TensorRT understood of a bundle's graphs computes what ONNX Runtime computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from helpers.bundles import exported
from helpers.networks import RTX, run_in_onnx_runtime
from helpers.places import DEMO, IMAGES
from pixtral_engines.arrays import NUMPY_DTYPES
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import parse_graph
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.backends.session import Array, Buffer, KVCache, Sessions
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.compare.parity import relative_error

ROWS = 16  # of the cache
SETTINGS = {
    "float16": ExportSettings(),
    "bfloat16": ExportSettings(dtype="bfloat16"),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn"),
    "nvfp4": ExportSettings(precision="nvfp4", method="rtn"),
    "int8": ExportSettings(precision="int8"),
    "int8 in float32": ExportSettings(precision="int8", dtype="float32"),
    "fp8 in float32": ExportSettings(precision="fp8", method="rtn", dtype="float32"),
}
TOLERANCE = {
    "float16": 6e-3,  # seen 2.6e-3
    "bfloat16": 4e-2,  # seen 1.0e-2, against float16
    "int4": 6e-3,  # seen 1.4e-3
    "nvfp4": 6e-3,  # seen 1.4e-3
    "int8": 0.2,  # seen 7.3e-2: where float16 rounds an activation the other way, its code moves a whole step
    "int8 in float32": 3e-2,  # seen 9.4e-7, and 9e-3 where one such step remains
    "fp8 in float32": 3e-2,  # seen 1.1e-6 with AVX-512, and 1.1e-2 with AVX2, where one such step remains
}
"""Share of a tensor's largest magnitude."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Float16, the reference for dtypes that ONNX Runtime has no kernels for."""
    return exported(DEMO, tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module", params=list(SETTINGS))
def named_bundle(
    request: pytest.FixtureRequest, plain: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Bundle]:
    if request.param == "float16":
        return request.param, plain
    return request.param, exported(DEMO, tmp_path_factory.mktemp("bundle") / "b", SETTINGS[request.param])


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
        self._dtype, self._random = bundle.dtype, np.random.default_rng(0)

    def floats(self, *shape: int) -> Array:
        return self._random.standard_normal(shape).astype(self._dtype)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        return self._random.integers(low, high, shape)


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
    pairs = bundle.graph_spec("decoder").caches
    for past, _ in pairs:
        is_coded = past.dtype == "int8"
        cache[past.name] = draw.integers(-127, 128, *shape).astype(np.int8) if is_coded else draw.floats(*shape)
    write_index = np.array([0, 4])
    for tokens in (5, 3, 1, 1):
        feeds = cache | {
            "hidden": draw.floats(2, tokens, decoder.dim),
            "position_ids": write_index[:, None] + np.arange(tokens),
            "write_index": write_index,
            "logits_index": np.array([tokens - 1, 2 * tokens - 1]),
        }
        inverse = np.array([1, 2], np.float32)
        seen = run(feeds | {"inverse_temperature": inverse})
        expected = reference(name, bundle, plain, "decoder", feeds)
        assert_picked(seen.pop("picked"), seen["logits"], inverse)
        assert seen["logits"].dtype == np.float32
        errors = {key: relative_error(value, expected[key]) for key, value in seen.items()}
        assert len(errors) == 1 + len(cache) and max(errors.values()) < TOLERANCE[name], errors
        cache = {past.name: expected[present.name].astype(cache[past.name].dtype) for past, present in pairs}
        write_index = write_index + tokens


def assert_picked(picked: Array, logits: Array, inverse: Array) -> None:
    """The best of each row, and what it weighs."""
    count = picked.shape[1] // 2
    assert count == 64
    order = np.argsort(-logits, 1, kind="stable")[:, :count]
    np.testing.assert_array_equal(picked[:, count:-1], order)
    np.testing.assert_array_equal(picked[:, :count], np.take_along_axis(logits, order, 1))
    mass = np.exp((logits - logits.max(1, keepdims=True)) * inverse[:, None]).sum(1)
    np.testing.assert_allclose(picked[:, -1], mass, rtol=1e-5)


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

    def shrink(self, rows: int) -> None:
        pass

    def view(self, start: int, stop: int) -> HostCache:
        assert (start, stop) == (0, self.slots)
        return self

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        assert source == target

    def layers(self) -> list[tuple[Array, Array]]:
        tensors = list(self.tensors.values())
        return list(zip(tensors[::2], tensors[1::2], strict=True))


class InterpreterSession:
    """The Session protocol over an interpreter."""

    def __init__(self, bundle: Bundle, graph: str, rows: int) -> None:
        parsed = parse_graph(bundle, graph, RTX, rows)
        self._interpreter = Interpreter(parsed.network, RTX, keep=parsed, cache_constants=True)
        self._pairs = bundle.graph_spec(graph).caches

    def run(self, feeds: dict[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        held = cache.tensors if isinstance(cache, HostCache) else {}
        arrays = {key: value if isinstance(value, np.ndarray) else value.numpy() for key, value in feeds.items()}
        outputs = self._interpreter.run(arrays | held)
        for past, present in self._pairs:
            held[past.name] = outputs.pop(present.name)
        return {key: HostBuffer(value) for key, value in outputs.items()}

    def new_cache(self, slots: int, rows: int) -> HostCache:
        inputs = {tensor.name: tensor for tensor in self._interpreter.inputs}
        pasts = [inputs[past.name] for past, _ in self._pairs]
        return HostCache({one.name: np.zeros((slots, *one.shape[1:]), NUMPY_DTYPES[one.dtype]) for one in pasts})


def test_greedy_answers_are_those_of_onnx_runtime(plain: Bundle) -> None:
    ours = load(plain.path)
    vision, embed, decoder = (InterpreterSession(plain, graph, 512) for graph in GRAPHS)
    sessions = Sessions(vision, embed, decoder, picks=True)  # type: ignore[arg-type]
    theirs = Model(plain, sessions, ours.prompts)
    for question, images in (
        ("Describe this image in one short sentence.", ["gray_circle_99x70.png"]),
        ("what color is the shape in the second image?", ["red_triangle_64x64.png", "blue_circle_64x64.png"]),
        ("Describe this image in one short sentence.", []),
    ):
        paths = [IMAGES / image for image in images]
        a, b = (model.generate(question, paths, max_new_tokens=24) for model in (ours, theirs))
        assert a.token_ids == b.token_ids and len(a.token_ids) > 1
