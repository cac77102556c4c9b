"""`--kv-cache int8`: keys and values as codes, in ONNX Runtime and as TensorRT takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from helpers.bundles import exported
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_engines.lowering_trt10_3 import scatter_into_cache
from pixtral_export.check import load_reference, reference_logits
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model import ops
from pixtral_export.plan import ExportSettings
from pixtral_export.quantization.formats import FORMATS, fake_quantize
from pixtral_runtime import load
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import cache_names
from pixtral_runtime.compare.compare import DEFAULT_PROMPT, CompareSettings, compare_bundles
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.prompt import Prompt

TOLERANCE = 5e-3
"""Share of the largest logit, float32. Seen: 2e-6; a value rounded to the other side of a step costs 1e-3."""
CHUNKS = (5, 3, 1, 1)  # tokens a call: prefill in two chunks, then decode


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(), dtype=torch.float32)


def quantized(checkpoint: Path, target: Path, **changes: Any) -> Bundle:
    settings = ExportSettings(dtype="float32", kv_cache="int8")
    return exported(checkpoint, target, replace(settings, **changes))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(quantized(checkpoint, tmp_path_factory.mktemp("bundle") / "b").path)


def scales(bundle: Bundle) -> dict[str, Tensor]:
    initializers = onnx.load(bundle.graph_path("decoder")).graph.initializer
    names = [f"{name}_scale" for name in cache_names("past", bundle.model.decoder.n_layers)]
    found = {t.name: torch.tensor(float(onnx.numpy_helper.to_array(t))) for t in initializers if t.name in names}
    return {name: found[name] for name in names}


def test_logits_are_those_of_torch_with_rounded_keys_and_values(
    bundle: Bundle, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scale is found by name, every row is written where it belongs, and read back with the right scale."""
    pairs = list(scales(bundle).values())
    per_layer = list(zip(pairs[::2], pairs[1::2], strict=True))
    attention, calls = ops.attention, 0

    def rounded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        nonlocal calls
        key, value = per_layer[calls % len(per_layer)]
        calls += 1
        return attention(q, fake_quantize(k, key, FORMATS["int8"]), fake_quantize(v, value, FORMATS["int8"]), mask)

    ids = np.random.default_rng(0).integers(20, 200, sum(CHUNKS))
    reference = load_reference(open_checkpoint(checkpoint), 64)
    with torch.inference_mode():
        table = torch.zeros(1, bundle.model.decoder.dim)
        plain = reference_logits(reference, torch.from_numpy(ids), torch.full((len(ids),), -1), table)
        monkeypatch.setattr(ops, "attention", rounded)
        expected = reference_logits(reference, torch.from_numpy(ids), torch.full((len(ids),), -1), table)
    seen = stepwise(bundle, ids)
    largest = float(expected.abs().max())
    error = float(np.abs(seen - expected.numpy()).max()) / largest
    assert error <= TOLERANCE
    assert float((plain - expected).abs().max()) / largest > 2 * error, "rounding must be visible for this to mean much"


def stepwise(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """Logits of all tokens, given to the decoder chunk by chunk."""
    runner = load(bundle.path).runner
    cache = runner.sessions.decoder.new_cache(1, len(ids))
    first = Prompt(ids[: CHUNKS[0]], np.full(CHUNKS[0], -1), (), 0)
    rows = [runner.prefill(first, runner.encode_images(first), cache, all_logits=True)]
    start = CHUNKS[0]
    for count in CHUNKS[1:]:
        positions = np.arange(start, start + count)[None]
        embedded = runner.sessions.embed.run(
            {
                "token_ids": ids[None, start : start + count],
                "image_features": np.zeros((1, bundle.model.decoder.dim), np.float32),
                "feature_index": np.full((1, count), -1),
            }
        )
        feeds = {"position_ids": positions, "write_index": positions[:, 0], "logits_index": np.arange(count)}
        run = runner.sessions.decoder.run({"hidden": embedded["hidden"], **feeds}, cache)
        rows.append(run["logits"].numpy())
        start += count
    assert all(keys.dtype == np.int8 and values.any() for keys, values in cache.layers())
    return np.concatenate(rows)


def test_the_cache_takes_a_quarter_of_a_float32_one_and_says_so(bundle: Bundle) -> None:
    decoder = bundle.model.decoder
    pairs = bundle.graph_spec("decoder").caches
    types = {tensor.dtype for pair in pairs for tensor in pair}
    assert (bundle.kv_cache, types) == ("int8", {"int8"})
    assert bundle.kv_cache_bytes_per_token == 2 * decoder.n_layers * decoder.n_kv_heads * decoder.head_dim
    model = onnx.load(bundle.graph_path("decoder"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    names = {tensor.name for pair in pairs for tensor in pair}
    caches = [v for v in (*model.graph.input, *model.graph.output) if v.name in names]
    assert len(caches) == 4 * decoder.n_layers
    assert {v.type.tensor_type.elem_type for v in caches} == {TensorProto.INT8}


def test_comparing_bundles_reads_codes_as_numbers(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    plain = quantized(checkpoint, tmp_path / "plain", kv_cache=None)
    found = compare_bundles(plain, bundle, [], [DEFAULT_PROMPT], CompareSettings(4), lambda *_: None)
    assert len(found.layers) == bundle.model.decoder.n_layers
    assert all(30 < layer.worst_db < 60 for layer in found.layers)  # 127 steps to the largest value


def test_it_joins_any_recipe(checkpoint: Path, tmp_path: Path) -> None:
    both = quantized(checkpoint, tmp_path / "b", precision="int4", group_size=32)
    assert (both.precision, both.kv_cache) == ("int4", "int8")
    assert len(scales(both)) == 2 * both.model.decoder.n_layers
    assert len(load(both.path).generate("What is this?", max_new_tokens=4).token_ids) >= 1


def test_the_form_for_tensorrt_computes_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """Two slots at different rows, over a cache that held something."""
    model = onnx.load(bundle.graph_path("decoder"))
    random = np.random.default_rng(1)
    positions = np.array([[0, 1, 2], [5, 6, 7]])
    feeds = {"position_ids": positions, "write_index": positions[:, 0], "logits_index": np.arange(6)}
    for past, _ in bundle.graph_spec("decoder").caches:
        shape = [int({"B": 2, "C": 16}.get(str(dim), dim)) for dim in past.shape]
        feeds[past.name] = random.integers(-127, 128, shape).astype(np.int8)
    feeds["hidden"] = random.standard_normal((2, 3, bundle.model.decoder.dim), np.float32)

    def run() -> list[np.ndarray]:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return [np.asarray(value) for value in session.run(None, feeds)]

    expected = run()
    scatter_into_cache(model)
    assert "TensorScatter" not in {node.op_type for node in model.graph.node}
    for a, b in zip(expected, run(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_fp8_cache_is_refused_with_what_works(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no KV cache in 'fp8'") as caught:
        quantized(checkpoint, tmp_path / "b", kv_cache="fp8")
    assert "int8" in caught.value.hint
