"""The device check without a device: its bookkeeping, the weights it invents, and that it sees what is wrong."""

from __future__ import annotations

import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import device_check
import device_compare
import device_weights
from device_check import Results, Stage, as_expected, run_stages, table
from device_compare import Case, compare_decoder
from device_weights import CODES_STD, FLOAT16, INT4, INT8, Stored, random_codes, stored_tensors, write_weights
from helpers.bundles import exported
from helpers.host_device import EagerDevice
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends import ort_cuda, ort_cuda_attention, ort_cuda_lowering
from pixtral_runtime.backends.ort_cuda import CudaSettings, OrtCudaSession
from pixtral_runtime.bundle.manifest import Bundle

FIGURE = '{"figure": "a", "value": 3, "unit": "ms"}'
STAGES = {"first": Stage("", 5, ()), "hangs": Stage("", 1, ()), "breaks": Stage("", 5, ()), "last": Stage("", 5, ())}
CASES = (Case("decode", (100, 3), 1, 512), Case("chunk", (40,), 16, 512))


def shell(name: str) -> list[str]:
    work = {"hangs": "sleep 60", "breaks": "exit 3"}.get(name, "true")
    return ["sh", "-c", f"echo '{FIGURE}'; echo noise; {work}"]


def saved(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# Bookkeeping


def test_a_stage_that_hangs_keeps_its_figures_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needing = {"needs it": Stage("", 5, ("breaks",))}
    monkeypatch.setattr(device_check, "STAGES", STAGES | needing)
    monkeypatch.setattr(device_check, "LEAST_S", 0)
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as log:
        run_stages(["first", "hangs", "breaks", "needs it", "last"], Results(tmp_path), log, time.time() + 60, shell)
    outcomes = {name: state["outcome"] for name, state in saved(tmp_path)["stages"].items()}
    assert outcomes == {
        "first": "ok",
        "hangs": "ended at its limit of 1 s",
        "breaks": "failed with 3",
        "needs it": "skipped: breaks failed",
        "last": "ok",
    }
    assert [figure["stage"] for figure in saved(tmp_path)["figures"]] == ["first", "hangs", "breaks", "last"]
    assert "noise" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_the_file_is_whole_after_each_figure(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for count in range(1, 4):
        device_check.take_line("stage", FIGURE, results, io.StringIO())
        assert len(saved(tmp_path)["figures"]) == count
    device_check.take_line("stage", "[1] no figure", results, io.StringIO())
    assert len(saved(tmp_path)["figures"]) == 3


def test_no_stage_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "STAGES", STAGES)
    run_stages(["first"], Results(tmp_path), io.StringIO(), time.time() + 1, shell)
    assert saved(tmp_path)["stages"]["first"]["outcome"] == "skipped: no time left"


def figure(name: str, value: object, expected: str = "", stage: str = "smoke") -> dict[str, Any]:
    return {"stage": stage, "figure": name, "value": value, "unit": "ms", "expected": expected}


def test_the_table_counts_what_is_right_and_names_what_is_not() -> None:
    figures = [
        figure("same answer", True, "True"),
        figure("error", 0.3, "< 0.02"),
        figure("not a number", float("nan"), "< 0.02"),
        figure("step", 5.25, "5 to 6", "int4"),
        figure("detail", 1),
        figure("crash", "failed: ValueError", stage="int4"),
    ]
    stages = {name: {"outcome": "ok", "seconds": 1.0} for name in ("smoke", "int4")}
    lines = table({"stages": stages, "figures": figures})
    assert "1 of 3 as they must be" in lines[0]
    assert [line.split("  ")[0] for line in lines[3:7]] == ["error", "not a number", "crash", "step"]
    assert lines[6].endswith("5 to 6") and "5.25" in lines[6]
    assert not any("detail" in line or "same answer" in line for line in lines)
    many = table({"stages": stages, "figures": [figure(f"step {n}", 1.0, "2", "int4") for n in range(99)]})
    assert len(many) == 40 and "and 63 more of these" in many


@pytest.mark.parametrize(
    ("value", "expected", "met"),
    [(True, "True", True), (False, "True", False), (0, "0", True), (7, "0", False), (0.01, "< 0.02", True),
     ("failed", "< 0.02", False), (5.0, "5 to 6", None), (5.0, "", None)],
)  # fmt: skip
def test_what_a_figure_must_be(value: object, expected: str, met: bool | None) -> None:
    assert as_expected(figure("a", value, expected)) is met


# Weights


def test_invented_weights_lie_where_the_graphs_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_weights, "BLOCK", 65_537)
    monkeypatch.setattr(device_weights, "PART", 1 << 16)
    for cached in (random_codes, device_weights.normal_values, device_weights._normal):
        cached.cache_clear()
    gate, scale, head, norm, patches = (
        Stored("layers.0.feed_forward.w1.weight", (256, 512), INT4, 0, 65_536),
        Stored("layers.0.feed_forward.w1.weight_scale", (2, 512), FLOAT16, 65_536, 2048),
        Stored("output.weight", (256, 4096), INT8, 69_632, 1 << 20),
        Stored("norm.weight", (256,), FLOAT16, 1_118_208, 512),
        Stored("vision_encoder.patch_conv.weight", (64, 3, 16, 16), FLOAT16, 1_122_304, 98_304),
    )
    for graph, stored in {"decoder": (gate, scale, head, norm), "embed": (norm,), "vision": (patches,)}.items():
        write_graph(tmp_path / f"{graph}.onnx", stored)
    assert stored_tensors(tmp_path) == [gate, scale, head, norm, patches]
    assert write_weights(tmp_path) == (tmp_path / "weights.bin").stat().st_size == patches.offset + patches.nbytes
    content = (tmp_path / "weights.bin").read_bytes()

    def values(tensor: Stored, kind: type) -> np.ndarray[Any, Any]:
        return np.frombuffer(content, kind, tensor.nbytes // np.dtype(kind).itemsize, tensor.offset)

    codes = values(gate, np.uint8)
    halves = np.concatenate([codes & 15, codes >> 4]).astype(int)
    assert 8 not in halves  # -8, which has no opposite
    signed = np.where(halves > 8, halves - 16, halves)
    assert abs(signed.mean()) < 0.05 and signed.std() == pytest.approx(CODES_STD[INT4], 0.02)
    assert values(scale, np.float16) * CODES_STD[INT4] * 16 == pytest.approx(np.ones(1024), 0.01)
    assert values(head, np.int8).std() == pytest.approx(CODES_STD[INT8], 0.02)
    assert values(norm, np.float16).mean() == pytest.approx(1, 0.01)
    assert values(patches, np.float16).std() == pytest.approx(1 / np.sqrt(768), 0.02)
    for cached in (random_codes, device_weights.normal_values, device_weights._normal):
        cached.cache_clear()


def write_graph(path: Path, stored: tuple[Stored, ...]) -> None:
    tensors = []
    for one in stored:
        tensor = onnx.TensorProto(name=one.name, dims=one.shape, data_type=one.kind)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "weights.bin", "offset": one.offset, "length": one.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)).SerializeToString())


# Answers


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory as the device, the CPU's kernels as its own."""
    device = EagerDevice()
    monkeypatch.setattr(device_compare, "device", lambda: device)
    monkeypatch.setattr(device_compare, "OrtCudaSession", partial(OrtCudaSession, place="cpu"))
    monkeypatch.setattr(device_weights, "BLOCK", 65_537)


def outcome(capsys: pytest.CaptureFixture[str], bundle: Bundle) -> tuple[float, dict[str, Any]]:
    """The worst difference, and the figures by their names."""
    compare_decoder("demo", bundle, {"form": CudaSettings()}, CASES)
    figures = {(one := json.loads(line))["figure"]: one for line in capsys.readouterr().out.splitlines()}
    return figures["demo form, worst"]["value"], figures


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("h") / "h", ExportSettings(dtype="float16"))


@pytest.mark.usefixtures("host")
def test_a_right_decoder_passes(half: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    worst, figures = outcome(capsys, half)
    assert worst < 0.01
    assert figures["demo form, decode"]["replayed"] and figures["demo form, decode"]["untouched"]
    assert figures["demo form, decode"]["argmax"] == "2 of 2"


@pytest.mark.usefixtures("host")
def test_attention_over_too_few_rows_is_seen(
    half: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ort_cuda_attention.attend_by_length

    def a_row_short(model: onnx.ModelProto) -> None:
        right(model)
        for tensor in model.graph.initializer:
            if tensor.name == "one_row":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int64), "one_row"))

    monkeypatch.setattr(ort_cuda_lowering, "attend_by_length", a_row_short)
    worst, _ = outcome(capsys, half)
    assert worst > 0.02


@pytest.mark.usefixtures("host")
def test_rows_written_where_none_are_due_are_seen(
    half: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OrtCudaSession.run

    def elsewhere(self: OrtCudaSession, feeds: Any, cache: Any = None) -> Any:
        return run(self, feeds | {"write_index": feeds["write_index"] + 1}, cache)

    monkeypatch.setattr(ort_cuda.OrtCudaSession, "run", elsewhere)
    worst, figures = outcome(capsys, half)
    assert not figures["demo form, decode"]["untouched"] and worst == float("inf")


def test_cases_of_large_decoders_fill_slots_differently() -> None:
    for case in device_compare.LARGE_CASES:
        assert len(set(case.starts)) == len(case.starts)
        assert max(case.starts) + case.tokens <= case.rows
