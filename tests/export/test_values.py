"""Weights that no number format can hold are named while they are read, before anything is calibrated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.bundles import exported
from helpers.tiny import edit_weights, tiny_config, write_checkpoint
from pixtral_export.plan import ExportSettings
from pixtral_runtime.bundle.manifest import FileEntry
from pixtral_runtime.errors import CheckpointError, SettingError

CONFIG = tiny_config()
NAMES = (
    "output.weight", "norm.weight", "tok_embeddings.weight", "layers.1.attention.wo.weight",
    "vision_encoder.patch_conv.weight", "vision_encoder.transformer.layers.1.ffn_norm.weight",
    "vision_language_adapter.w_in.bias",
)  # fmt: skip
INT4 = ExportSettings(precision="int4", group_size=32)
CHOICES = {
    "float16": ExportSettings(), "float32": ExportSettings(dtype="float32"),
    "bfloat16": ExportSettings(dtype="bfloat16"), "int4": INT4,
    "int4 rounded": ExportSettings(precision="int4", group_size=32, method="rtn"),
    "fp8": ExportSettings(precision="fp8"), "cache": ExportSettings(kv_cache="int8"),
}  # fmt: skip


def with_value(folder: Path, name: str, value: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint whose last value of one tensor is `value`."""
    write_checkpoint(folder, CONFIG, dtype=dtype)

    def put(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    edit_weights(folder / "consolidated.safetensors", put)
    return folder


def no_calibration(*_: object, **__: object) -> None:
    raise AssertionError("calibration began")


@pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
def test_nan_is_named_in_every_precision_before_calibration(
    tmp_path: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixtral_export.weights.layerwise.quantize_block", no_calibration)
    folder = with_value(tmp_path / "c", "layers.1.attention.wo.weight", float("nan"))
    with pytest.raises(CheckpointError, match=r"'layers\.1\.attention\.wo\.weight' holds NaN") as caught:
        exported(folder, tmp_path / "b", settings)
    assert str(folder / "consolidated.safetensors") in str(caught.value)
    assert not caught.value.options  # no dtype helps
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_part_of_the_model_is_looked_at(tmp_path: Path, name: str, value: float) -> None:
    kind = "NaN" if value != value else "an infinite value"
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' holds {kind}"):
        exported(with_value(tmp_path / "c", name, value), tmp_path / "b")


@pytest.mark.parametrize(("settings", "value"), [(ExportSettings(), 1e5), (INT4, 1e6)], ids=["float16", "int4"])
def test_values_beyond_float16_are_named_with_the_dtypes_that_hold_them(
    tmp_path: Path, settings: ExportSettings, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e5 as a weight; 1e6 as a scale of int4 codes up to 7."""
    monkeypatch.setattr("pixtral_export.weights.layerwise.quantize_block", no_calibration)
    folder = with_value(tmp_path / "c", "layers.1.attention.wo.weight", value)
    with pytest.raises(SettingError, match=r"layers\.1\.attention\.wo\.weight holds values beyond float16") as caught:
        exported(folder, tmp_path / "b", settings)
    assert [option.value for option in caught.value.options] == ["bfloat16", "float32"]


def test_finite_weights_whose_sums_overflow_are_named_by_layer(tmp_path: Path) -> None:
    folder = with_value(tmp_path / "c", "layers.0.attention_norm.weight", 3e38, torch.float32)
    with pytest.raises(CheckpointError, match=r"the input of layers\.0\.\S+ is not finite on the calibration samples"):
        exported(folder, tmp_path / "b", ExportSettings("float32", precision="int4", group_size=32))
    with pytest.raises(CheckpointError, match=r"the output of layers\.0 is not finite on the calibration samples"):
        exported(folder, tmp_path / "b", ExportSettings("float32", kv_cache="int8"))


@pytest.mark.parametrize(("settings", "value"), [(INT4, 0.0), (CHOICES["fp8"], 1e-40)], ids=["zeros", "denormals"])
def test_a_tensor_of_zeros_or_denormals_is_exported(
    tmp_path: Path, settings: ExportSettings, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to divide by. The weights are what counts, so no graphs are traced."""
    monkeypatch.setattr("pixtral_export.export._write_graph", lambda *_: FileEntry(0, ""))
    write_checkpoint(tmp_path / "c", CONFIG)

    def fill(weights: dict[str, Tensor]) -> None:
        for name in ("layers.0.feed_forward.w3.weight", "layers.1.attention_norm.weight"):
            weights[name].fill_(value)

    edit_weights(tmp_path / "c" / "consolidated.safetensors", fill)
    bundle = exported(tmp_path / "c", tmp_path / "b", settings)
    assert bundle.files["weights.bin"].bytes == (bundle.path / "weights.bin").stat().st_size
