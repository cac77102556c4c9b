"""Parsing for TensorRT: what the importer drops, widens or refuses is said, and weights stay in their file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.external_data_helper import convert_model_to_external_data

from helpers.networks import RTX, interpret, make_model, parse, run_in_onnx_runtime
from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import _Layer, _widened_layers, refuse_dropped_inputs
from pixtral_runtime.backends.trt_package import TENSORRT_PACKAGES, Flavor, import_tensorrt
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.errors import InputError, MachineError

RANDOM = np.random.default_rng(0)
ROWS, FILLED = 16, np.array([5, 9])


def half(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float16)


ATTENTION = {"q": half(2, 4, 3, 8), "k": half(2, 2, ROWS, 8), "v": half(2, 2, ROWS, 8)}
LENGTHS = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"], "attend")


@pytest.fixture
def lengths_model() -> onnx.ModelProto:
    return make_model([LENGTHS], {**ATTENTION, "lengths": FILLED}, ["y"])


def test_the_importer_drops_the_lengths_of_a_cache_without_a_word(lengths_model: onnx.ModelProto) -> None:
    parsed = parse(lengths_model)
    assert not [warning for warning in parsed.warnings if "Unused" in warning]
    with pytest.raises(InputError, match="drops the input 'lengths' of node 'attend'") as caught:
        refuse_dropped_inputs(parsed, Path("model.onnx"))
    assert "tensorrt-rtx" in caught.value.hint


def test_without_the_refusal_attention_looks_at_stale_rows(lengths_model: onnx.ModelProto) -> None:
    """TensorRT computes what ONNX Runtime does for a cache that is filled to the last row."""
    feeds = {**ATTENTION, "lengths": FILLED}
    seen = interpret(lengths_model, feeds)["y"]
    wanted = run_in_onnx_runtime(lengths_model.SerializeToString(), feeds)["y"]
    full = run_in_onnx_runtime(lengths_model.SerializeToString(), {**feeds, "lengths": np.array([ROWS, ROWS])})["y"]
    assert relative_error(seen, wanted) > 0.3
    assert relative_error(seen, full) < 2e-3  # seen 5e-4


def test_a_dropped_input_is_found_where_others_read_it_too() -> None:
    """Where the builder's warning "Unused Input" is silent."""
    nodes = [
        helper.make_node("Add", ["last", "one"], ["lengths"], "count"),
        LENGTHS,
        helper.make_node("Add", ["lengths", "last"], ["z"], "other"),
    ]
    model = make_model(nodes, {**ATTENTION, "last": FILLED - 1}, ["y", "z"], one=np.array([1]))
    assert parse(model).dropped == (("attend", "lengths"),)


def test_a_mask_in_its_place_is_read() -> None:
    nodes = [
        helper.make_node("Less", ["rows", "lengths"], ["mask"], "mask"),
        helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"], "attend"),
    ]
    feeds = {**ATTENTION, "lengths": FILLED[:, None, None, None]}
    model = make_model(nodes, feeds, ["y"], rows=np.arange(ROWS)[None, None, None].repeat(3, 2))
    assert not parse(model).dropped
    expected = run_in_onnx_runtime(model.SerializeToString(), feeds)["y"]
    assert relative_error(interpret(model, feeds)["y"], expected) < 2e-3  # seen 6e-4


def test_a_node_that_the_importer_refuses_is_named() -> None:
    nodes = [helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "ok", "ov"], "with_past")]
    model = make_model(nodes, {**ATTENTION, "pk": half(2, 2, 4, 8), "pv": half(2, 2, 4, 8)}, ["y", "ok", "ov"])
    with pytest.raises(InputError, match=r"model.onnx: tensorrt_rtx .* node 'with_past' \(Attention\)"):
        parse(model)


def test_layers_are_named_that_compute_in_float32_unasked() -> None:
    """Against a graph that says float16 where the parsed one said float32."""
    nodes = [
        helper.make_node("Cast", ["x"], ["w"], "widen", to=onnx.TensorProto.FLOAT),
        helper.make_node("Sin", ["w"], ["s"], "sine"),
        helper.make_node("Cast", ["s"], ["y"], "narrow", to=onnx.TensorProto.FLOAT16),
    ]
    feeds = {"x": half(3)}
    said = make_model(nodes, feeds, ["y"])
    parsed = parse(said)
    assert parsed.widened == ()
    nodes[0].attribute[0].i = onnx.TensorProto.FLOAT16
    layers = [_Layer.of(parsed.network.get_layer(n)) for n in range(parsed.network.num_layers)]
    assert list(_widened_layers(layers, make_model(nodes, feeds, ["y"]))) == ["widen", "sine"]


def test_weights_are_mapped_from_their_file(tmp_path: Path) -> None:
    x, weight = half(3, 64), half(64, 32)
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], {"x": x}, ["y"], w=weight)
    convert_model_to_external_data(model, location="weights.bin")
    onnx.save(model, tmp_path / "model.onnx")
    parsed = parse(onnx.load(tmp_path / "model.onnx", load_external_data=False), tmp_path / "model.onnx")
    (mapped,) = parsed.weights
    assert isinstance(mapped, np.memmap) and Path(str(mapped.filename)).name == "weights.bin"
    constants = {}
    Interpreter(parsed.network, RTX, keep=parsed).run(
        {"x": x}, lambda layer, _, value: constants.update({layer: value})
    )
    np.testing.assert_array_equal(constants["w"], weight)
    assert np.shares_memory(constants["w"], mapped)


def test_an_older_parser_reads_the_weight_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT before 10.13 takes no weights from memory."""
    x, weight = half(3, 64), half(64, 32)
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], {"x": x}, ["y"], w=weight)
    convert_model_to_external_data(model, location="weights.bin")
    onnx.save(model, tmp_path / "model.onnx")

    class Older:
        def __init__(self, *arguments: object) -> None:
            self.parser = new_parser(*arguments)
            self.parse = self.parser.parse

    new_parser = RTX.OnnxParser
    monkeypatch.setattr(RTX, "OnnxParser", Older)
    parsed = parse(onnx.load(tmp_path / "model.onnx", load_external_data=False), tmp_path / "model.onnx")
    assert parsed.weights == ()
    seen = Interpreter(parsed.network, RTX, keep=parsed).run({"x": x})["y"]
    assert relative_error(seen, x.astype(np.float32) @ weight.astype(np.float32)) < 2e-3  # seen 4e-4


def test_a_cut_weight_file_is_refused(tmp_path: Path) -> None:
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": half(3, 64)}, ["y"], w=half(64, 32))
    convert_model_to_external_data(model, location="weights.bin")
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"weights.bin: bytes 0 to 4096 do not hold w"):
        parse(onnx.load(tmp_path / "model.onnx", load_external_data=False), tmp_path / "model.onnx")


@pytest.mark.parametrize("flavor", TENSORRT_PACKAGES)
def test_a_missing_tensorrt_says_what_to_install(flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = TENSORRT_PACKAGES[flavor]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MachineError, match=package) as caught:
        import_tensorrt(flavor)
    assert caught.value.hint == f"pip install 'pixtral[{extra}]'"
