"""Costs against what torch counts in our own modules, bytes against real files, and the page of predictions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import predict_ceilings
from helpers.bundles import exported
from helpers.places import ROOT
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.decoder import causal_mask
from pixtral_export.model.pixtral import Pixtral
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime import load
from pixtral_runtime.backends.ort_caches import OrtCache
from pixtral_runtime.bench.cpu_rates import MATRIX_KINDS, matrix_kind, measure_bandwidth, measure_matrix_rate
from pixtral_runtime.bench.one_node_model import single_node
from pixtral_runtime.bench.roofline import Ceiling, Cost, Sizes, ceiling, stage_costs
from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import graph_weight_bytes, weight_bytes
from pixtral_runtime.errors import InputError

SIZES = Sizes(
    tiny_config(), {"vision": 1000, "embed": 512 * 7, "decoder": 5000}, cache_bytes_per_token=100, activation_bytes=2
)
INT4 = ExportSettings(precision="int4", method="rtn", group_size=32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("roofline")
    return exported(write_checkpoint(folder / "c", tiny_config()), folder / "b", INT4)


@pytest.fixture(scope="module")
def pixtral() -> Pixtral:
    with torch.device("meta"):
        empty = Pixtral(tiny_config(), positions=64)
    return empty.to_empty(device="cpu").eval()


def counted(run: Callable[[], Any]) -> int:
    """Operations of all matrix products and convolutions, attention taken apart so that it is counted."""
    backend = torch.nn.attention.SDPBackend.MATH
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("grid", "batch"), [((3, 5), 1), ((4, 2), 3)])
def test_the_operations_of_an_image_are_those_torch_counts(pixtral: Pixtral, grid: tuple[int, int], batch: int) -> None:
    pixels = torch.zeros(batch, 3, 16 * grid[0], 16 * grid[1])
    cost = stage_costs(SIZES, grid=grid, prompt_tokens=1, context_rows=1, batch=batch)["vision"]
    assert cost.flops == counted(lambda: pixtral.image_features(pixels))


def test_the_operations_of_a_step_are_those_torch_counts(pixtral: Pixtral) -> None:
    slots, rows = 3, 11
    cost = stage_costs(SIZES, prompt_tokens=1, context_rows=rows, batch=slots)["decode"]
    assert cost.flops == counted(lambda: step(pixtral, slots, rows))


def test_a_prompt_takes_what_its_tokens_take_one_by_one_but_one_row_of_logits(pixtral: Pixtral) -> None:
    tokens = 9
    decoder = pixtral.config.decoder
    head = 2 * decoder.dim * decoder.vocab_size
    one_by_one = [counted(lambda rows=rows: step(pixtral, 1, rows)) for rows in range(1, tokens + 1)]  # type: ignore[misc]
    cost = stage_costs(SIZES, prompt_tokens=tokens, context_rows=1)["prefill"]
    assert cost.flops == sum(one_by_one) - (tokens - 1) * head
    whole = counted(
        lambda: pixtral.hidden(torch.zeros(1, tokens, decoder.dim), torch.arange(tokens)[None], mask(tokens))
    )
    masked = 4 * decoder.n_layers * decoder.n_heads * decoder.head_dim * tokens * (tokens - 1) // 2
    assert cost.flops == whole - masked + head


def step(pixtral: Pixtral, slots: int, rows: int) -> None:
    """One token for each slot, the last of `rows` rows."""
    decoder = pixtral.config.decoder
    x, positions = torch.zeros(slots, 1, decoder.dim), torch.full((slots, 1), rows - 1)
    past = torch.zeros(slots, decoder.n_kv_heads, rows, decoder.head_dim)
    for layer in pixtral.layers:
        seen = causal_mask(positions, past)
        x, _, _ = layer(x, pixtral.cos, pixtral.sin, positions, seen, past, past, positions[:, 0])
    pixtral(x, torch.arange(slots))


def mask(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]


def test_bytes_are_weights_once_cache_rows_once_and_the_graphs_inputs_and_outputs() -> None:
    costs = stage_costs(SIZES, grid=(2, 3), prompt_tokens=10, context_rows=20, batch=4)
    assert costs["vision"].bytes == 1000 + 4 * 6 * (3 * 256 + 96) * 2
    assert costs["embed"] == Cost(weight_bytes=70, activation_bytes=(10 + 6) * 96 * 2)
    assert costs["prefill"].bytes == 5000 + 10 * 100 + 10 * 96 * 2 + 512 * 4
    assert costs["decode"].bytes == 5000 + 4 * 20 * 100 + 4 * (96 * 2 + 512 * 4)


def test_a_side_is_a_square_grid_and_no_image_costs_nothing() -> None:
    side = stage_costs(SIZES, image_side=40, prompt_tokens=1, context_rows=1)
    assert side == stage_costs(SIZES, grid=(3, 3), prompt_tokens=1, context_rows=1)
    assert stage_costs(SIZES, prompt_tokens=1, context_rows=1)["vision"] == Cost()


@pytest.mark.parametrize(
    "work",
    [
        {"prompt_tokens": 0, "context_rows": 1},
        {"prompt_tokens": 1, "context_rows": 1, "batch": 0},
        {"prompt_tokens": 1, "context_rows": 1, "grid": (0, 4)},
        {"prompt_tokens": 1, "context_rows": 1, "grid": (4, 4), "image_side": 64},
    ],
)
def test_work_that_makes_no_sense_is_refused(work: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        stage_costs(SIZES, **work)
    assert caught.value.hint


def test_weight_bytes_are_those_of_the_files(bundle: Bundle) -> None:
    for graph in ("vision", "embed", "decoder"):
        model = onnx.load(bundle.graph_path(graph), load_external_data=False)
        expected = {
            tensor.name: int(entry.value)
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "length"
        }
        assert weight_bytes(bundle.graph_path(graph)) == expected
    opened = open_checkpoint(bundle.path.with_name("c"))
    planned = plan_export(opened, replace(INT4, max_context=bundle.limits.max_context))
    by_graph = {graph: 0 for graph in ("vision", "embed", "decoder")}
    for item in planned.weights:
        if reader := predict_ceilings.graph_of(item):
            by_graph[reader] += item.nbytes
    assert Sizes.of(bundle).weights == by_graph
    assert 0 < graph_weight_bytes(bundle, "decoder") < bundle.files["weights.bin"].bytes


def test_cache_bytes_are_those_of_the_cache_the_runtime_makes(bundle: Bundle) -> None:
    cache = load(bundle.path).runner.sessions.decoder.new_cache(2, 256)
    assert isinstance(cache, OrtCache)
    held = sum(keys.nbytes + values.nbytes for keys, values in cache.layers())
    assert stage_costs(bundle, prompt_tokens=1, context_rows=256, batch=2)["decode"].cache_bytes == held


def test_a_file_that_is_no_graph_is_named(tmp_path: Path, bundle: Bundle) -> None:
    broken = tmp_path / "decoder.onnx"
    for content in (b"\x3a\xff\xff\x03" + b"x" * 9, b"\xff" * 40, bundle.graph_path("decoder").read_bytes()[:-100]):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=r"decoder\.onnx"):
            weight_bytes(broken)
    with pytest.raises(InputError, match="missing"):
        weight_bytes(tmp_path / "missing.onnx")


def test_the_ceiling_is_the_slower_of_moving_and_computing() -> None:
    cost = Cost(matrix_flops=600, attention_flops=100, weight_bytes=50, cache_bytes=30, activation_bytes=20)
    assert ceiling(cost, 100, 7000) == Ceiling(1.0, 0.1)
    assert ceiling(cost, 100, 7000).bound_by == "memory" and ceiling(cost, 100, 7000).seconds == 1
    assert ceiling(cost, 1000, 100).bound_by == "compute" and ceiling(cost, 1000, 100).seconds == 7
    assert ceiling(cost, 1000, 600, attention_flops_per_s=100).compute_s == 2


def test_bandwidth_is_measured_with_a_spread() -> None:
    seen = measure_bandwidth(2, 1 << 24)
    assert seen.n >= 5 and 1e8 < seen.min <= seen.p50 <= seen.max


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_a_matrix_rate_is_measured_for_each_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixtral_runtime.bench.cpu_rates.MATRIX_SHAPE", (16, 256, 128))
    monkeypatch.setattr("pixtral_runtime.bench.cpu_rates.MATRIX_SECONDS", 0.0)
    assert measure_matrix_rate(1, kind).min > 1e6


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="int2") as caught:
        measure_matrix_rate(1, "int2")
    assert all(kind in caught.value.hint for kind in MATRIX_KINDS)


def test_a_graph_written_by_hand_passes_the_checker_and_computes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 300), np.float32), rng.standard_normal((300, 2), np.float32)
    model = single_node("MatMul", {"a": a}, {"b": b}, ("float32", (3, 2)))
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    (seen,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"a": a})
    np.testing.assert_allclose(seen, a @ b, rtol=1e-5)


def test_the_kind_measured_is_the_one_the_runtime_computes_with(bundle: Bundle, tmp_path: Path) -> None:
    operators = {"int4-weights": ("MatMulNBits", 4), "int8-weights": ("MatMulNBits", 8)}
    for stage in ("vision", "decoder"):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{stage}.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(bundle.graph_path(stage), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / f"{stage}.onnx", load_external_data=False).graph.node
        bits = {(n.op_type, a.i) for n in nodes for a in n.attribute if a.name == "bits"}
        assert operators[matrix_kind(bundle, stage)] in bits
    assert matrix_kind(replace(bundle, precision="int8"), "decode") == "int8"
    assert matrix_kind(replace(bundle, precision="fp8"), "decode") == "float32"


def test_the_page_holds_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "roofline.md").read_text(encoding="utf-8")
    tables = predict_ceilings.tables()
    assert predict_ceilings.BEGIN + tables + predict_ceilings.END in page
    assert {line.split()[1] for line in tables.splitlines() if re.match(r"\| [a-z0-9-]+ \|", line)} >= {
        *predict_ceilings.NAMES
    }


def test_a_device_with_more_of_everything_is_predicted_faster() -> None:
    sizes, footprint = predict_ceilings.planned("int4")
    cost = stage_costs(sizes, image_side=1024, prompt_tokens=4224, context_rows=4352)["decode"]
    peaks = [KNOWN_DEVICES[name].peak for name in ("orin-nx-16", "agx-orin-64", "a100-80", "h200")]
    times = [predict_ceilings.predicted(cost, peak, "int4").seconds for peak in peaks if peak]
    assert len(times) == 4 and times == sorted(times, reverse=True)
    # What docs/quantization.md measured of a bundle of the 12B's shapes.
    assert sizes.weights["decoder"] == pytest.approx(6.3e9, rel=0.01)
    assert footprint.weights["int4"] == pytest.approx(7.43e9, rel=0.01)


@pytest.mark.parametrize("precision", predict_ceilings.PRECISIONS)
def test_decode_is_bound_by_memory_everywhere(precision: str) -> None:
    sizes, _ = predict_ceilings.planned(precision)
    for peak in (
        device.peak for device in KNOWN_DEVICES.values() if device.peak and (precision != "fp8" or device.peak.fp8)
    ):
        for batch in predict_ceilings.BATCHES:
            cost = stage_costs(sizes, prompt_tokens=1, context_rows=predict_ceilings.CONTEXT_ROWS, batch=batch)
            assert predict_ceilings.predicted(cost["decode"], peak, precision).bound_by == "memory"
