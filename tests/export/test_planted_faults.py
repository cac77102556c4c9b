"""Mistakes in the parts that the Mistral 3 family has and Pixtral-12B has not fail `check` against the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pixtral_export.weights.weight_file as weight_file
from helpers.bundles import export_tiny
from helpers.family import MEMBERS
from helpers.tiny import edit_weights, write_checkpoint
from pixtral_export.check import check_bundle, load_reference
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.rope import decoder_rope_tables
from pixtral_runtime import load
from pixtral_runtime.bundle.config import DecoderConfig, QueryScale, Yarn
from pixtral_runtime.compare.parity import TensorCheck

LENGTH = 512  # of YaRN's original context: no prompt of the check reaches it
_MEMBER = MEMBERS["Ministral-3-8B"]
CONFIG = replace(
    _MEMBER, decoder=replace(_MEMBER.decoder, yarn=Yarn(64.0, LENGTH), query_scale=QueryScale(0.1, LENGTH))
)
MERGING = "patch_merger.merging_layer.weight"
Tables = Callable[[DecoderConfig, int], tuple[Tensor, ...]]


def without_scale(config: DecoderConfig, positions: int) -> tuple[Tensor, ...]:
    cos, sin = decoder_rope_tables(replace(config, query_scale=None), positions)
    return cos, sin, cos, sin


def with_half_the_factor(config: DecoderConfig, positions: int) -> tuple[Tensor, ...]:
    assert config.yarn is not None
    return decoder_rope_tables(replace(config, yarn=replace(config.yarn, factor=config.yarn.factor / 2)), positions)


def failures(checkpoint: Path, bundle: Path) -> list[TensorCheck]:
    reference = load_reference(open_checkpoint(checkpoint), 1024)
    return [one for one in check_bundle(load(bundle), reference) if not one.passed]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", CONFIG, dtype=torch.float32)


def test_a_right_bundle_passes(checkpoint: Path, tmp_path: Path) -> None:
    assert not failures(checkpoint, export_tiny(checkpoint, tmp_path / "b", dtype="float32"))


@pytest.mark.parametrize("planted", [without_scale, with_half_the_factor])
def test_wrong_rotary_tables_fail(
    planted: Tables, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "decoder_rope_tables", planted)
    seen = failures(checkpoint, export_tiny(checkpoint, tmp_path / "b", dtype="float32"))
    assert {"tables"} <= {one.stage for one in seen}
    if planted is with_half_the_factor:
        assert {"prefill", "decode"} <= {one.stage for one in seen}


def test_a_merger_that_takes_patches_and_not_channels_together_fails(checkpoint: Path, tmp_path: Path) -> None:
    """A product of patch-major features by the weight is one of channel-major features by its columns in that order."""
    bundle_of = write_checkpoint(tmp_path / "planted", CONFIG, dtype=torch.float32)
    patches, width = CONFIG.vision.spatial_merge_size**2, CONFIG.vision.hidden_size

    def turn(weights: dict[str, Tensor]) -> None:
        weights[MERGING] = weights[MERGING].unflatten(1, (patches, width)).transpose(1, 2).flatten(1).contiguous()

    edit_weights(bundle_of / "consolidated.safetensors", turn)
    seen = failures(checkpoint, export_tiny(bundle_of, tmp_path / "b", dtype="float32"))
    assert {"vision", "prefill"} <= {one.stage for one in seen}
