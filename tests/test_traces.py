"""Traces are shared by all tests of a run, so nothing that changes a trace may be missing from their key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import tiny_config
from helpers.traces import key
from pixtral_export.graphs import assemble, trace
from pixtral_runtime.bundle.config import ModelConfig

CONFIG = tiny_config()
VISION, DECODER = CONFIG.vision, CONFIG.decoder
PIECES = 7


def keys(monkeypatch: pytest.MonkeyPatch, config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[str]:
    """The keys of an export, which asks for all its pieces and gets nothing."""
    seen: list[str] = []

    def note(module: nn.Module, inputs: Sequence[Tensor], axes: Sequence[trace.Axes]) -> None:
        seen.append(key(module, inputs, axes))

    monkeypatch.setattr(assemble, "trace", note)
    for pieces in (assemble._vision_pieces, assemble._embed_piece, assemble._decoder_pieces):
        pieces.__wrapped__(config, dtype)
    return seen


def test_the_same_model_has_the_same_keys_however_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = keys(monkeypatch, CONFIG)
    assert len(set(first)) == PIECES
    assert keys(monkeypatch, CONFIG) == first
    assert keys(monkeypatch, replace(CONFIG, decoder=replace(DECODER, n_layers=7))) == first


@pytest.mark.parametrize(
    ("config", "dtype", "changed"),
    [
        (CONFIG, torch.float16, 7),
        (replace(CONFIG, adapter_bias=False), torch.float32, 1),
        (replace(CONFIG, vision=replace(VISION, norm_eps=1e-6)), torch.float32, 2),
        (replace(CONFIG, vision=replace(VISION, hidden_act="gelu")), torch.float32, 2),
        (replace(CONFIG, vision=replace(VISION, patch_size=32)), torch.float32, 2),
        (replace(CONFIG, decoder=replace(DECODER, norm_eps=1e-6)), torch.float32, 2),
        (replace(CONFIG, decoder=replace(DECODER, vocab_size=600)), torch.float32, 2),
        (replace(CONFIG, decoder=replace(DECODER, n_kv_heads=1)), torch.float32, 2),
        (replace(CONFIG, decoder=replace(DECODER, hidden_dim=96)), torch.float32, 1),
    ],
)
def test_a_setting_changes_the_keys_of_the_pieces_it_has_a_part_in(
    config: ModelConfig, dtype: torch.dtype, changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = keys(monkeypatch, CONFIG), keys(monkeypatch, config, dtype)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == changed
