"""Synthetic checkpoints: one model in both formats, in shards of bounded size."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.tiny import tiny_config
from make_synthetic_checkpoint import SIZES, stored, write_checkpoint
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_export.checkpoint.tensor_names import hf_name
from pixtral_export.export import export
from pixtral_export.model.parameters import parameters
from pixtral_export.plan import ExportSettings, plan_export

CONFIG = tiny_config()
SHARD_BYTES = 60_000  # less than the embedding, more than any tensor of a layer


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mistral")
    size = write_checkpoint(folder, CONFIG, seed=3)
    assert size == (folder / "consolidated.safetensors").stat().st_size
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("hf")
    size = write_checkpoint(folder, CONFIG, format="hf", seed=3, shard_bytes=SHARD_BYTES)
    opened = open_checkpoint(folder)
    assert size == opened.total_bytes
    return opened


def _tensor_bytes(file: Path) -> dict[str, int]:
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name).nbytes for name in shard.keys()}  # noqa: SIM118, it is no dict


def test_both_formats_hold_the_same_values(mistral: Checkpoint, hf: Checkpoint) -> None:
    assert (mistral.format, hf.format) == ("mistral", "hf")
    assert mistral.config == hf.config == CONFIG
    for parameter in parameters(CONFIG):
        assert torch.equal(mistral.read(parameter), hf.read(parameter)), parameter.name


def test_both_formats_export_to_the_same_bytes(mistral: Checkpoint, hf: Checkpoint, tmp_path: Path) -> None:
    for opened in (mistral, hf):
        plan = plan_export(opened, ExportSettings(dtype="float32", max_context=256))
        export(opened, plan, tmp_path / opened.format, force=False, progress=lambda *_: None)
    files = sorted(path.name for path in (tmp_path / "mistral").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "hf").iterdir()) and "weights.bin" in files
    for file in files:
        assert (tmp_path / "mistral" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file


def test_another_seed_gives_other_values(mistral: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, seed=4)
    other = open_checkpoint(tmp_path)
    assert not any(torch.equal(mistral.read(parameter), other.read(parameter)) for parameter in parameters(CONFIG))


def test_a_shard_holds_at_most_the_limit_or_a_single_tensor(hf: Checkpoint) -> None:
    shards = [_tensor_bytes(file) for file in hf.files]
    assert all(sum(shard.values()) <= SHARD_BYTES or len(shard) == 1 for shard in shards)
    assert any(len(shard) > 1 for shard in shards) and any(sum(shard.values()) > SHARD_BYTES for shard in shards)


def test_shards_are_as_full_as_the_order_of_the_parameters_allows(hf: Checkpoint) -> None:
    sizes = {name: nbytes for file in hf.files for name, nbytes in _tensor_bytes(file).items()}
    weight_map = json.loads((hf.path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    order = [hf_name(parameter.name) for parameter in parameters(CONFIG)]
    assert list(weight_map) == order
    for before, after in pairwise(order):
        if weight_map[before] != weight_map[after]:
            held = sum(size for name, size in sizes.items() if weight_map[name] == weight_map[before])
            assert held + sizes[after] > SHARD_BYTES, after


def test_the_index_names_every_shard_and_counts_the_bytes_of_tensors(hf: Checkpoint) -> None:
    index = json.loads((hf.path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored = {name: file.name for file in hf.files for name in _tensor_bytes(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(sum(_tensor_bytes(file).values()) for file in hf.files)
    count = len(hf.files)
    assert [file.name for file in hf.files] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def test_a_tiny_vocabulary_gets_a_tokenizer_of_its_size(mistral: Checkpoint) -> None:
    tokenizer = json.loads(mistral.tokenizer.read_text(encoding="utf-8"))
    special_tokens = tokenizer["config"]["default_num_special_tokens"]
    assert len(tokenizer["vocab"]) + special_tokens == CONFIG.decoder.vocab_size
    assert len(tokenizer["vocab"]) >= 256  # every byte


PARAMETERS = {
    "pixtral-12b": 12_682_739_712, "pixtral-large": 124_134_845_824, "mistral-small-3.1": 24_011_361_280,
    "devstral-small-2": 24_011_361_280, "ministral-3-3b": 3_849_090_048, "ministral-3-8b": 8_918_026_240,
    "ministral-3-14b": 13_945_031_680,
}  # fmt: skip
"""Specification section 4.5."""


@pytest.mark.parametrize("size", list(SIZES))
def test_sizes_are_the_published_models(size: str) -> None:
    assert sum(math.prod(parameter.shape) for parameter in stored(SIZES[size]())) == PARAMETERS[size]
