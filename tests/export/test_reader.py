"""Checkpoints: every published format gives the same tensors, and what cannot be read is refused by name."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from helpers.tiny import edit_json, edit_weights, random_weights, refusal, tiny_config, write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.checkpoint.tensor_names import halves_to_pairs, hf_new_name, pairs_to_halves
from pixtral_export.model.parameters import parameters
from pixtral_runtime.errors import InputError

CONFIG = tiny_config()
PARAMETERS = {parameter.name: parameter for parameter in parameters(CONFIG)}
FORMATS = ("mistral", "hf", "hf-new")
WQ = "layers.1.attention.wq.weight"


# Reading


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_format_gives_the_same_tensors(tmp_path: Path, format: str, shards: int, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, format=format, shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.config, checkpoint.path) == (format, CONFIG, folder)
    assert f"torch.{checkpoint.stored_dtype}" == str(dtype)
    assert len(checkpoint.files) == shards
    assert checkpoint.total_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert checkpoint.tokenizer == folder / "tekken.json"
    expected = random_weights(CONFIG, dtype)
    for name, parameter in PARAMETERS.items():
        tensor, stored = checkpoint.read(parameter), expected[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, parameter.shape)
        assert torch.equal(
            tensor, pairs_to_halves(stored, parameter.rotary_heads) if parameter.rotary_heads else stored
        )


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_without_bias_has_none(tmp_path: Path, format: str) -> None:
    config = tiny_config(adapter_bias=False)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, format=format))
    assert checkpoint.config == config
    assert not any(name.endswith("bias") for name in checkpoint.tensors)


@pytest.mark.parametrize("format", ["hf", "hf-new"])
def test_transformers_loads_the_same_tensors(tmp_path: Path, format: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, CONFIG, format=format, shards=2))
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert set(state) == {hf_new_name(name) for name in PARAMETERS}
    for name, parameter in PARAMETERS.items():
        assert torch.equal(checkpoint.read(parameter), state[hf_new_name(name)]), name


def test_rotary_rows_move_as_the_specification_says() -> None:
    heads, head_dim = 2, 6
    rows = heads * head_dim
    mistral = torch.arange(rows)[:, None].expand(rows, 3).contiguous()
    halves = pairs_to_halves(mistral, heads)
    assert halves[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for head in range(heads):
        for j in range(head_dim // 2):
            for half in (0, 1):
                hf_row, mistral_row = head * head_dim + j + half * head_dim // 2, head * head_dim + 2 * j + half
                assert torch.equal(halves[hf_row], mistral[mistral_row])
    assert torch.equal(halves_to_pairs(halves, heads), mistral)


def mapped(tensor: Tensor, file: Path) -> bool:
    """Whether a tensor's memory is a mapping of `file`."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(file.resolve()))]
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_a_tensor_is_copied_only_where_rows_move(mistral: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(mistral)
    (file,) = checkpoint.files
    kept, moved = checkpoint.read(PARAMETERS["tok_embeddings.weight"]), checkpoint.read(PARAMETERS[WQ])
    assert mapped(kept, file)
    assert not mapped(moved, file)
    hf = open_checkpoint(write_checkpoint(tmp_path / "single", CONFIG, format="hf"))
    assert mapped(hf.read(PARAMETERS[WQ]), hf.files[0])
    del kept
    assert str(file) not in Path("/proc/self/maps").read_text(encoding="utf-8")  # pages go with the last tensor


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_a_checkpoint_larger_than_memory_is_never_mapped_whole(mistral: Path) -> None:
    """A private mapping of 25 GB is refused on a host of 24: only the span of the tensor itself may be mapped."""
    checkpoint = open_checkpoint(mistral)
    small, file = checkpoint.read(PARAMETERS["norm.weight"]), str(checkpoint.files[0])
    (line,) = [line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if file in line]
    start, end = (int(address, 16) for address in line.split()[0].split("-"))
    assert end - start <= small.nbytes + 2 * mmap.PAGESIZE < checkpoint.total_bytes


def test_reading_after_the_file_is_gone_names_it(mistral: Path) -> None:
    checkpoint = open_checkpoint(mistral)
    checkpoint.files[0].unlink()
    with pytest.raises(InputError, match=r"consolidated\.safetensors cannot be read"):
        checkpoint.read(PARAMETERS[WQ])


def test_a_folder_with_both_formats_is_read_as_mistral(mistral: Path) -> None:
    write_checkpoint(mistral, CONFIG, format="hf", seed=1)
    checkpoint = open_checkpoint(mistral)
    assert checkpoint.format == "mistral"
    assert any("two formats" in warning for warning in checkpoint.warnings)
    assert torch.equal(checkpoint.read(PARAMETERS["norm.weight"]), random_weights(CONFIG)["norm.weight"])


def test_weights_without_their_own_config_do_not_hide_the_other_format(mistral: Path) -> None:
    write_checkpoint(mistral, CONFIG, format="hf")
    (mistral / "params.json").unlink()
    assert open_checkpoint(mistral).format == "hf"


def test_saved_rotary_frequencies_are_ignored(hf: Path) -> None:
    frequencies = {"vision_tower.patch_positional_embedding.inv_freq": torch.zeros(8, dtype=torch.float64)}
    edit_weights(hf / "model-00001-of-00002.safetensors", lambda weights: weights.update(frequencies))
    assert set(open_checkpoint(hf).tensors) == set(PARAMETERS)


def test_shards_without_an_index_are_all_read(hf: Path) -> None:
    (hf / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(hf).tensors) == set(PARAMETERS)


# Folders that cannot be read


def test_paths_that_are_no_checkpoint_are_refused(mistral: Path, tmp_path: Path) -> None:
    assert "not a folder" in str(refusal(tmp_path / "nothing"))
    error = refusal(mistral / "consolidated.safetensors")
    assert "one file" in str(error) and error.hint.endswith(str(mistral))
    (tmp_path / "empty").mkdir()
    assert "no weights" in str(refusal(tmp_path / "empty"))
    (tmp_path / "empty" / "model.safetensors.incomplete").touch()
    assert "no weights" in str(refusal(tmp_path / "empty"))


def test_a_folder_that_may_not_be_read_is_named(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # the mode itself does not stop root
    assert f"{mistral} cannot be read: Permission denied" in str(refusal(mistral))


@pytest.mark.parametrize(("format", "name"), [("mistral", "params.json"), ("hf", "config.json")])
def test_a_missing_or_broken_config_is_named(tmp_path: Path, format: str, name: str) -> None:
    path = write_checkpoint(tmp_path, CONFIG, format=format) / name
    path.write_text("{", encoding="utf-8")
    assert f"{path} is broken JSON" in str(refusal(tmp_path))
    path.write_bytes(b"\xff\xfe")
    assert f"{path} is broken JSON" in str(refusal(tmp_path))
    path.write_text("[]", encoding="utf-8")
    assert "expected an object" in str(refusal(tmp_path))
    path.unlink()
    assert f"no {name}" in str(refusal(tmp_path))


def test_a_shard_that_the_index_names_must_be_there(hf: Path) -> None:
    (hf / "model-00002-of-00002.safetensors").unlink()
    assert "1 of the 2 files" in str(refusal(hf)) and "model-00002-of-00002.safetensors" in str(refusal(hf))
    (hf / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "no weight_map" in str(refusal(hf))


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 5000, "1 of the 3 files"), ("a\0b", "files outside the folder"), (".", "files outside the folder")],
    ids=["too long", "zero byte", "dot"],
)
def test_a_name_that_no_file_can_have_is_refused(hf: Path, name: str, words: str) -> None:
    def change(index: dict[str, dict[str, str]]) -> None:
        index["weight_map"]["lm_head.weight"] = name

    edit_json(hf / "model.safetensors.index.json", change)
    assert words in str(refusal(hf))


@pytest.mark.parametrize("kept", [0, 1, -2])
def test_a_truncated_file_names_the_first_tensor_beyond_its_end(mistral: Path, kept: int) -> None:
    file = mistral / "consolidated.safetensors"
    with safe_open(file, framework="pt") as opened:
        names = opened.offset_keys()
        sizes = [2 * PARAMETERS[name].shape[0] * torch.Size(PARAMETERS[name].shape[1:]).numel() for name in names]
    whole = file.stat().st_size
    beyond = range(len(names))[kept] + 1  # one byte of this tensor is left
    seen = whole - sum(sizes) + sum(sizes[:beyond]) + 1
    os.truncate(file, seen)
    message = str(refusal(mistral))
    assert f"{file} is cut off: expected {whole} bytes, seen {seen}; '{names[beyond]}' is the first" in message


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_that_ends_within_its_header_is_refused(mistral: Path, size: int) -> None:
    os.truncate(mistral / "consolidated.safetensors", size)
    error = refusal(mistral)
    assert "ends within its header" in str(error) and f"seen {size}" in str(error)


def test_files_that_are_no_safetensors_are_refused(mistral: Path) -> None:
    file = mistral / "consolidated.safetensors"
    for text in (b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}', b"\xff"):
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        assert "header is broken" in str(refusal(mistral))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 25365\n")
    error = refusal(mistral)
    assert "git-lfs pointer" in str(error) and "lfs pull" in error.hint


def test_bytes_after_the_last_tensor_are_refused(mistral: Path) -> None:
    with (mistral / "consolidated.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "consolidated.safetensors cannot be read" in str(refusal(mistral))


def test_missing_tensors_are_listed_in_the_files_spelling(hf: Path) -> None:
    def drop(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if ".layers.1.mlp" in name]:
            del weights[name]

    for file in hf.glob("*.safetensors"):
        edit_weights(file, drop)
    message = str(refusal(hf))
    assert "3 missing: language_model.model.layers.1.mlp.gate_proj.weight (160, 96)" in message
    assert "2 weight files" in message


def test_only_three_tensors_of_a_kind_are_listed(mistral: Path) -> None:
    edit_json(mistral / "params.json", lambda params: params.update(n_layers=1, hidden_dim=192))
    message = str(refusal(mistral))
    assert "9 unexpected: " in message and message.count("layers.1.") == 3 and "; and 6 more" in message
    assert (
        "3 of another shape: layers.0.feed_forward.w1.weight in consolidated.safetensors: "
        "expected (192, 96), seen (160, 96)" in message
    )
    assert str(mistral / "consolidated.safetensors") in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, shards=2)
    twice = {"norm.weight": random_weights(CONFIG)["norm.weight"]}
    for file in folder.glob("*.safetensors"):
        edit_weights(file, lambda weights: weights.update(twice))
    assert "1 unexpected: norm.weight twice" in str(refusal(folder))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("weight", torch.float8_e4m3fn),  # FP8
        ("weight", torch.int8),  # bitsandbytes, compressed-tensors
        ("weight_packed", torch.int32),  # compressed-tensors
        ("qweight", torch.int32),  # GPTQ, AWQ
        ("weight", torch.uint32),  # MLX
    ],
)
def test_quantized_weights_are_refused(mistral: Path, suffix: str, dtype: torch.dtype) -> None:
    def quantize(weights: dict[str, Tensor]) -> None:
        weights[WQ.replace("weight", suffix)] = weights.pop(WQ).to(dtype)
        weights[f"{WQ}_scale"] = torch.ones(1)

    edit_weights(mistral / "consolidated.safetensors", quantize)
    error = refusal(mistral)
    assert "already quantized" in str(error) and WQ.replace("weight", suffix) in str(error)
    assert "bfloat16" in error.hint


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config(), format="hf", shards=2)
    edit_json(folder / "model.safetensors.index.json", lambda data: data["weight_map"].update(odd=name))
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    assert "names files outside the folder" in str(refusal(folder))
