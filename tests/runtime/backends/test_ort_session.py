"""What ONNX Runtime makes of a bundle's graphs, and the cache in slots."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from helpers.bundles import exported
from helpers.host_device import EagerDevice
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.device_buffers import DeviceCache
from pixtral_runtime.backends.ort_caches import CACHE_STEP_ROWS, OrtCache
from pixtral_runtime.backends.ort_cuda import CudaSettings, OrtCudaSession
from pixtral_runtime.backends.ort_session import OrtSession, OrtSettings, open_graph, ort_errors
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS, CachePairs, TensorSpec
from pixtral_runtime.errors import BundleError, InputError, MemoryShortageError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("bundle") / "b", ExportSettings())


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_products_of_int8_bundles_are_computed_in_int8(
    graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product left in float would turn its whole weight into float at every step."""
    bundle = exported(DEMO, tmp_path / "bundle", ExportSettings(precision="int8"))
    plain = ort.SessionOptions

    def writing() -> ort.SessionOptions:
        options = plain()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return options

    monkeypatch.setattr(ort, "SessionOptions", writing)
    OrtSession(bundle, graph, OrtSettings())
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    made = {name: node.op_type for node in nodes for name in node.output}
    left = [node.name for node in nodes if node.op_type == "MatMul" and made.get(node.input[1]) == "DequantizeLinear"]
    kinds = Counter(node.op_type for node in nodes)
    assert left == []
    kept = [name for name in bundle.quantization["unquantized_inputs"] if ("vision" in name) == (graph == "vision")]
    assert len(kept) <= 3  # layers whose rounded inputs would cost too much
    assert kinds["MatMulIntegerToFloat"] >= (21 if graph == "decoder" else 28) - len(kept)


@pytest.mark.parametrize(("policy", "spins"), [("passive", "0"), ("PASSIVE", "0"), ("active", "1"), ("", "1")])
def test_threads_that_wait_sleep_where_the_environment_says_so(
    policy: str, spins: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    options = open_graph(bundle.graph_path("embed")).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins


EXACT = 1e-6  # seen 6e-8; 0.19 on AVX2 if sums of two products may saturate in 16 bits


def test_products_of_int8_are_exact_whatever_the_processor(tmp_path: Path) -> None:
    """Codes as large as they come: on x86 without VNNI ONNX Runtime's first choice of kernels saturates."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (512, 256)).astype(np.int8)
    x = rng.integers(-128, 128, (8, 512)).astype(np.float32)
    weights = {"w": codes, "scales": np.full(256, 0.5, np.float32), "scale": np.float32(1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["w", "scales"], ["wide"], axis=1),
        helper.make_node("MatMul", ["rounded", "wide"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (8, 256))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_graph(model.SerializeToString(), has_int8_products=True, optimized=tmp_path / "optimized.onnx")
    (seen,) = session.run(None, {"x": x})
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert kinds == {"QuantizeLinear", "MatMulIntegerToFloat"}  # in int8, not in float
    expected = x.astype(np.float64) @ codes.astype(np.float64) * 0.5
    assert np.abs(seen - expected).max() <= EXACT * np.abs(expected).max()


def test_an_int8_bundle_that_would_be_computed_wrong_here_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles of before have no zero points that ONNX Runtime could move."""
    monkeypatch.setattr("pixtral_runtime.backends.ort_session.int8_sums_saturate", lambda: True)
    with pytest.raises(BundleError, match="exactly") as raised:
        OrtSession(replace(bundle, precision="int8", quantization={}), "vision", OrtSettings())
    assert "--precision int8 --force" in raised.value.hint
    OrtSession(replace(bundle, precision="int8", quantization={"zero_points": True}), "vision", OrtSettings())
    monkeypatch.setattr("pixtral_runtime.backends.ort_session.int8_sums_saturate", lambda: False)
    OrtSession(replace(bundle, precision="int8", quantization={}), "vision", OrtSettings())


def cache(slots: int, rows: int) -> OrtCache:
    rng, shape = np.random.default_rng(0), ("B", 2, "C", 4)
    pairs = tuple(
        (TensorSpec(f"past_{kind}_0", shape, "float32"), TensorSpec(f"present_{kind}_0", shape, "float32"))
        for kind in ("key", "value")
    )
    return OrtCache(pairs, [rng.standard_normal((slots, 2, rows, 4)).astype(np.float32) for _ in pairs])


def test_a_cache_grows_and_shrinks_in_steps_and_keeps_its_rows() -> None:
    made = cache(2, CACHE_STEP_ROWS)
    before = [tensor.copy() for layer in made.layers() for tensor in layer]
    made.reserve(CACHE_STEP_ROWS + 1)
    assert made.rows == 2 * CACHE_STEP_ROWS
    for was, now in zip(before, made.layers()[0], strict=True):
        np.testing.assert_array_equal(now[:, :, :CACHE_STEP_ROWS], was)
        assert not now[:, :, CACHE_STEP_ROWS:].any()
    made.shrink(3)
    assert made.rows == CACHE_STEP_ROWS  # and all of them are what they were: whoever reads `rows` may rely on it
    for was, now in zip(before, made.layers()[0], strict=True):
        np.testing.assert_array_equal(now, was)


def test_views_and_copies_reach_the_same_memory() -> None:
    made = cache(3, CACHE_STEP_ROWS)
    key = made.layers()[0][0]
    view = made.view(1, 3)
    assert (view.slots, view.rows) == (2, CACHE_STEP_ROWS)
    view.layers()[0][0][0, 0, 0, 0] = 77
    assert key[1, 0, 0, 0] == 77
    rest = key[2, :, 5:].copy()
    made.copy_rows(1, 2, 5)
    np.testing.assert_array_equal(key[2, :, :5], key[1, :, :5])
    np.testing.assert_array_equal(key[2, :, 5:], rest)


@pytest.mark.parametrize("device", [None, EagerDevice()], ids=["cpu", "device"])
def test_a_decoder_runs_on_a_cache_of_its_own_backend_and_tensors_only(
    device: EagerDevice | None, bundle: Bundle
) -> None:
    on_device = OrtCudaSession(bundle, "decoder", device or EagerDevice(), CudaSettings(), place="cpu")
    on_cpu = OrtSession(bundle, "decoder", OrtSettings())
    decoder, other_decoder = (on_device, on_cpu) if device else (on_cpu, on_device)
    zero = np.zeros(1, np.int64)
    hidden = np.ones((1, 1, bundle.model.decoder.dim), bundle.dtype)
    feeds = {"hidden": hidden, "position_ids": zero[None], "write_index": zero, "logits_index": zero}
    if device:
        feeds["inverse_temperature"] = np.ones(1, np.float32)
    own = decoder.new_cache(1, 1)
    elsewhere = other_decoder.new_cache(1, 1)
    kinds = [type(one).__name__ for one in (own, elsewhere)]
    last = f"past_value_{bundle.model.decoder.n_layers - 1}"

    def other(tensors: CachePairs) -> OrtCache | DeviceCache:
        shape, dtype = (1, 2, CACHE_STEP_ROWS, 4), np.dtype(np.int8)
        if device:
            return DeviceCache(device, tensors, shape, dtype, most=CACHE_STEP_ROWS)
        return OrtCache(tensors, [np.zeros(shape, dtype) for _ in tensors])

    fewer = other(own.tensors[:2])
    codes = other(tuple((replace(past, dtype="int8"), replace(present, dtype="int8")) for past, present in own.tensors))
    for cache, message in (
        (None, f"decoder needs a cache, past_key_0 .*float16.* to {last}.*: none was handed over"),
        (elsewhere, f"decoder runs here on a cache of the kind {kinds[0]}, seen {kinds[1]}"),
        (fewer, f"decoder's cache is past_key_0 .* to {last} .*, seen past_key_0 .* to past_value_0 "),
        (codes, f"decoder's cache is past_key_0 .*float16.*, seen past_key_0 .*int8.* to {last}"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            decoder.run(feeds, cache)
        assert "new_cache" in raised.value.hint
    assert not any(tensor.any() for cache in (elsewhere, fewer, codes) for layer in cache.layers() for tensor in layer)
    decoder.run(feeds, own.view(0, 1))
    assert all(tensor.any() for layer in own.layers() for tensor in layer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": {"dim": 64}}, "image_features"),
        ({"decoder": {"vocab_size": 77}}, "logits float32 (?, 77)"),
        ({"decoder": {"n_layers": 1}}, "past_key_1"),
        ({"vision": {"num_channels": 4}}, "pixels float16 (?, 4, ?, ?)"),
        ({"dtype": "float32"}, "pixels float32"),
    ],
)
def test_a_graph_of_other_sizes_than_the_manifest_says_is_refused(
    change: dict[str, Any], words: str, bundle: Bundle
) -> None:
    sizes = {part: replace(getattr(bundle.model, part), **new) for part, new in change.items() if part != "dtype"}
    other = replace(bundle, model=replace(bundle.model, **sizes), dtype=change.get("dtype", bundle.dtype))
    refusals = []
    for graph in GRAPHS:
        try:
            OrtSession(other, graph, OrtSettings())
        except BundleError as error:
            refusals.append(str(error))
    assert any("is not the graph" in refusal and words in refusal for refusal in refusals), refusals


def test_a_damaged_graph_is_refused_where_its_bytes_are_no_text(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime quotes them in a message that then is none."""
    graph = onnx.load(bundle.graph_path("embed"), load_external_data=False)
    graph.graph.node[0].op_type = "Odd"
    data = graph.SerializeToString()
    assert data.count(b"Odd") == 1
    (tmp_path / "embed.onnx").write_bytes(data.replace(b"Odd", b"O\xffd"))
    with pytest.raises(BundleError, match=r"embed\.onnx is damaged"):
        open_graph(tmp_path / "embed.onnx")


def test_a_graph_that_cannot_be_computed_is_the_bundles_fault(bundle: Bundle, tmp_path: Path) -> None:
    """It loads, and ends in an index beyond a table."""
    copy = replace(bundle, path=Path(shutil.copytree(bundle.path, tmp_path / "copy")))
    embed = OrtSession(copy, "embed", OrtSettings())
    zero = np.zeros((1, 1), np.int64)
    features = np.zeros((1, bundle.model.decoder.dim), bundle.dtype)
    with pytest.raises(BundleError, match=r"embed\.onnx cannot be computed: .*") as raised:
        embed.run({"token_ids": zero + 10**6, "image_features": features, "feature_index": zero - 1})
    assert "--verify" in raised.value.hint


ARENA = "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal"


@pytest.mark.parametrize(
    "reason",
    [
        f"{ARENA}(size_t, bool, onnxruntime::Stream*) Failed to allocate memory for requested buffer of size 2097152\n",
        "CUDA failure 2: out of memory ; GPU=0 ; file=cuda_allocator.cc ; line=48 ; expr=cudaMalloc(p, s); ",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_); ",
    ],
)
def test_too_little_memory_is_said_wherever_the_reason_stands(reason: str) -> None:
    start = "Error in execution: Non-zero status code returned while running Gather node. Name:"
    start += "'tok_embeddings.node_embedding_1' "
    with (
        pytest.raises(MemoryShortageError, match=r"too little memory for embed\.onnx"),
        ort_errors(Path("b/embed.onnx"), "cannot be computed"),
    ):
        raise RuntimeError(f"{start}Status Message: {reason}")


def test_a_graph_without_a_cache_refuses_one(bundle: Bundle) -> None:
    vision, decoder = (OrtSession(bundle, graph, OrtSettings()) for graph in ("vision", "decoder"))
    side = bundle.model.vision.patch_size
    feeds = {"pixels": np.zeros((1, 3, side, side), bundle.dtype)}
    with pytest.raises(InputError, match="vision has no cache, seen OrtCache"):
        vision.run(feeds, decoder.new_cache(1, 1))
    assert list(vision.run(feeds)) == ["image_features"]
