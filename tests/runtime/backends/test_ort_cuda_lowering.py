"""Products that are joined for CUDA hold the numbers of the bundle's graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.ort_cuda_attention import attend_by_length, put_rows_first
from pixtral_runtime.backends.ort_cuda_lowering import CONTRIB, LOWERED, WIDE_FLOAT_PRODUCT, Lowered, Weight, lowered
from pixtral_runtime.bundle.manifest import Bundle

QUERIES, GATE = "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    settings = ExportSettings(precision="int4", method="rtn", group_size=128)
    return exported(DEMO, tmp_path_factory.mktemp("int4") / "b", settings)


def products(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Weights, or what makes them wide, by the tensor that they are multiplied by."""
    found: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            found.setdefault(node.input[0], []).append(node.input[1])
    return found


def portable(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(str(bundle.graph_path("decoder"))).graph


def unpacked(weight: Weight) -> np.ndarray:
    """Codes of 4 bits (K, N) as numbers; the first of two lies in a byte's low half."""
    rows, columns = weight.data.shape
    pairs = weight.data.reshape(-1)[: rows * columns // 2]
    nibbles = np.stack([pairs & 15, pairs >> 4], 1).reshape(rows, columns).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def stored(bundle: Bundle, *names: str) -> np.ndarray:
    values = {tensor.name: tensor for tensor in portable(bundle).initializer}
    return np.concatenate([numpy_helper.to_array(values[name]).astype(np.float32) for name in names], 1)


def others(name: str) -> list[str]:
    """The layers that read what this one reads, in the graph's order."""
    layer = name.removesuffix(".weight")
    return [f"{layer[:-1]}{letter}.weight" for letter in ("qkv" if layer.endswith("q") else "13")]


@pytest.mark.parametrize("block", [None, 32])
def test_products_of_one_tensor_are_one(int4: Bundle, block: int | None) -> None:
    graph, weights, _ = lowered(int4.graph_path("decoder"), block=block)
    model = onnx.load_from_string(graph)
    assert all(len(names) == 1 for names in products(model.graph).values())
    assert max(len(names) for names in products(portable(int4)).values()) == 3
    for name in (QUERIES, GATE):
        joined = "+".join(others(name)) + LOWERED
        np.testing.assert_array_equal(unpacked(weights[joined]), stored(int4, *others(name)))
        scales = stored(int4, *(f"{other}_scale" for other in others(name)))
        repeats = 128 // block if block else 1
        np.testing.assert_array_equal(weights[f"{joined}_scale"].data, scales.repeat(repeats, 0))
    names = [tensor.name for tensor in model.graph.initializer]
    read = {name for node in model.graph.node for name in node.input}
    assert len(names) == len(set(names)) and set(names) <= read and set(weights) <= set(names)


def test_every_code_gets_the_small_blocks(int4: Bundle) -> None:
    """Products that stand alone and the head too, whose codes are of 8 bits."""
    graph, weights, _ = lowered(int4.graph_path("decoder"), block=32)
    wide = [node for node in onnx.load_from_string(graph).graph.node if node.op_type == "DequantizeLinear"]
    assert len(wide) == 4 * int4.model.decoder.n_layers + 1
    assert {attribute.i for node in wide for attribute in node.attribute if attribute.name == "block_size"} == {32}
    np.testing.assert_array_equal(weights["output.weight" + LOWERED].data, stored(int4, "output.weight"))


def test_blocks_that_are_no_multiple_are_left(int4: Bundle) -> None:
    assert _blocks(lowered(int4.graph_path("decoder"), block=48)) == {128}


def _blocks(result: Lowered) -> set[int]:
    nodes = onnx.load_from_string(result.graph).graph.node
    return {one.i for node in nodes for one in node.attribute if one.name == "block_size"}


def test_wide_products_of_floats_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fill a device by themselves; joined they would be copied for nothing."""
    bundle = exported(DEMO, tmp_path / "b")
    assert max(bundle.model.decoder.hidden_dim, bundle.model.decoder.dim) < WIDE_FLOAT_PRODUCT
    _, weights, _ = lowered(bundle.graph_path("decoder"))
    for name in (QUERIES, GATE):
        np.testing.assert_array_equal(weights["+".join(others(name)) + LOWERED].data, stored(bundle, *others(name)))
    monkeypatch.setattr(
        "pixtral_runtime.backends.ort_cuda_lowering.WIDE_FLOAT_PRODUCT", bundle.model.decoder.hidden_dim
    )
    _, weights, _ = lowered(bundle.graph_path("decoder"))
    assert any("attention" in name for name in weights) and not any("feed_forward" in name for name in weights)


def test_all_norms_of_a_decoder_but_the_first_and_the_last_take_their_sum_in(int4: Bundle) -> None:
    model = onnx.load_from_string(lowered(int4.graph_path("decoder")).graph)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * int4.model.decoder.n_layers - 1
    assert kinds.count("RMSNormalization") == 2
    assert {entry.domain for entry in model.opset_import} == {"", CONTRIB}


def by_length(bundle: Bundle) -> onnx.ModelProto:
    model = onnx.load(str(bundle.graph_path("decoder")), load_external_data=False)
    attend_by_length(model)
    return model


def test_rows_stay_first_from_products_to_products(int4: Bundle) -> None:
    decoder, model = int4.model.decoder, by_length(int4)
    assert put_rows_first(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not kinds["Transpose"] and kinds["Reshape"] == 1  # of the rows that get logits
    caches = [
        value for value in (*model.graph.input, *model.graph.output) if value.name.startswith(("past", "present"))
    ]
    assert len(caches) == 4 * decoder.n_layers
    for value in caches:
        slots, rows, width = value.type.tensor_type.shape.dim
        sizes = (slots.dim_param, rows.dim_param, width.dim_value)
        assert sizes == ("B", "C", decoder.n_kv_heads * decoder.head_dim)
    assert lowered(int4.graph_path("decoder")).rows_first
    assert not lowered(int4.graph_path("decoder"), by_length=False).rows_first
    assert not lowered(int4.graph_path("vision")).rows_first


@pytest.mark.parametrize("other", ["float32", "other heads", "one more reader", "no lengths"])
def test_attention_that_is_made_in_another_way_keeps_its_heads_first(other: str, int4: Bundle) -> None:
    """In one layer: caches of all layers lie alike."""
    model = by_length(int4)
    if other == "float32":
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif other == "other heads":
        last = [node for node in model.graph.node if node.op_type == "Transpose"][-2]  # of the last layer's values
        last.attribute[0].ints[:] = [0, 2, 3, 1]
    elif other == "one more reader":
        [turned] = [node for node in model.graph.node if node.op_type == "RotaryEmbedding"][-1:]
        model.graph.node.append(onnx.helper.make_node("Neg", [turned.output[0]], ["negated"]))
    else:
        for node in model.graph.node:
            if node.op_type == "Attention":
                node.input[6:] = []
    before = model.SerializeToString()
    assert not put_rows_first(model)
    assert model.SerializeToString() == before
