"""Checkpoints: every published format gives the same tensors, and what cannot be read is refused by name."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from make_synthetic_checkpoint import params_json
from pixtral_export.checkpoint import Checkpoint, open_checkpoint
from pixtral_export.checkpoint_config import find_tokenizer, read_hf_config, read_mistral_config
from pixtral_export.hub import resolve_checkpoint
from pixtral_export.layout import halves_to_pairs, hf_new_name, pairs_to_halves, parameters
from pixtral_runtime.config import ImageTokens
from pixtral_runtime.errors import InputError, MachineError
from tiny import hf_config, random_weights, tiny_config, write_checkpoint

CONFIG = tiny_config()
PARAMETERS = {parameter.name: parameter for parameter in parameters(CONFIG)}
FORMATS = ("mistral", "hf", "hf-new")
WQ = "layers.1.attention.wq.weight"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "mistral", CONFIG)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", CONFIG, format="hf", shards=2)


def edit_json(path: Path, change: Change) -> Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    return caught.value


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


# Configurations


def without(*path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


PIXTRAL_12B = {
    "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "rope_theta": 1000000000.0, "norm_eps": 1e-05, "vocab_size": 131072,
    "vision_encoder": {
        "hidden_size": 1024, "num_channels": 3, "image_size": 1024, "patch_size": 16, "rope_theta": 10000.0,
        "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_token_id": 10,
    },
}  # fmt: skip
PIXTRAL_12B_HF = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_seq_length": 1,
    "image_token_index": 10, "model_type": "llava", "projector_hidden_act": "gelu", "torch_dtype": "bfloat16",
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "text_config": {
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "is_composition": True,
        "max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None,
        "vocab_size": 131072,
    },
    "vision_config": {
        "head_dim": 64, "hidden_act": "silu", "image_size": 1024, "is_composition": True, "model_type": "pixtral",
        "patch_size": 16, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


def test_the_published_files_of_pixtral_12b_agree_in_both_formats(tmp_path: Path) -> None:
    params, config = tmp_path / "params.json", tmp_path / "config.json"
    params.write_text(json.dumps(PIXTRAL_12B), encoding="utf-8")
    config.write_text(json.dumps(PIXTRAL_12B_HF), encoding="utf-8")
    model, warnings = read_mistral_config(params)
    assert read_hf_config(config)[0] == model
    assert sum(torch.Size(p.shape).numel() for p in parameters(model)) == 12_682_739_712  # specification section 1.2
    assert (model.decoder.head_dim, model.vision.head_dim, model.decoder.max_position) == (128, 64, 131_072)
    assert model.image_tokens == ImageTokens(10, 12, 13) and model.adapter_bias
    assert len(warnings) == 1 and "image_break_token_id = 12, image_end_token_id = 13" in warnings[0]


def test_absent_keys_mean_what_transformers_makes_of_them(tmp_path: Path) -> None:
    data = hf_config(CONFIG)
    for section in ("text_config", "vision_config"):
        for key in [key for key in data[section] if key not in ("model_type", "sliding_window", "hidden_act")]:
            del data[section][key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    reference: Any = LlavaConfig.from_pretrained(tmp_path)
    text, vision = reference.text_config, reference.vision_config
    seen, _ = read_hf_config(path)
    assert (seen.decoder.dim, seen.decoder.n_layers) == (text.hidden_size, text.num_hidden_layers)
    assert (seen.decoder.n_heads, seen.decoder.n_kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert (seen.decoder.head_dim, seen.decoder.hidden_dim) == (text.head_dim, text.intermediate_size)
    assert (seen.decoder.vocab_size, seen.decoder.norm_eps) == (text.vocab_size, text.rms_norm_eps)
    assert seen.decoder.max_position == text.max_position_embeddings
    assert seen.decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert seen.vision.rope_theta == vision.rope_parameters["rope_theta"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        assert getattr(seen.vision, key) == getattr(vision, key)
    for key in ("num_channels", "image_size", "patch_size"):
        assert getattr(seen.vision, key) == getattr(vision, key)


def test_a_config_that_transformers_wrote_itself_is_read(tmp_path: Path) -> None:
    LlavaConfig.from_dict(hf_config(CONFIG)).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path / "config.json")[0] == CONFIG


def test_image_ids_are_read_where_a_file_names_them(hf: Path) -> None:
    edit_json(hf / "config.json", lambda data: data.update(image_token_id=data.pop("image_token_index")))
    edit_json(hf / "config.json", lambda data: data.update(image_break_token_id=14, image_end_token_id=15))
    config, warnings = read_hf_config(hf / "config.json")
    assert config.image_tokens == ImageTokens(10, 14, 15) and not warnings


@pytest.mark.parametrize(
    "change", [with_value("gelu", "vision_config", "hidden_act"), without("vision_config", "hidden_act")]
)
def test_silu_is_forced_with_a_warning(hf: Path, change: Change) -> None:
    edit_json(hf / "config.json", change)
    checkpoint = open_checkpoint(hf)
    assert [w for w in checkpoint.warnings if 'vision_config.hidden_act = "gelu"' in w and "SiLU is used" in w]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_seq_len": 2048}, 2048),
        ({"max_seq_len": 1_024_000}, 131_072),
        ({}, 131_072),
    ],
)
def test_positions_are_bounded_by_what_the_model_was_trained_for(
    tmp_path: Path, given: dict[str, int], expected: int
) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(PIXTRAL_12B | given), encoding="utf-8")
    assert read_mistral_config(path)[0].decoder.max_position == expected


def test_head_dim_follows_from_the_heads_where_it_is_absent(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params_json(CONFIG)), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)), encoding="utf-8")
    edit_json(tmp_path / "config.json", with_value(None, "text_config", "head_dim"))
    assert read_mistral_config(edit_json(tmp_path / "params.json", without("head_dim")))[0].decoder.head_dim == 96 // 4
    assert read_hf_config(tmp_path / "config.json")[0].decoder.head_dim == 96 // 4


MISTRAL_REFUSED = [
    (with_value(2, "vision_encoder", "spatial_merge_size"), "vision_encoder.spatial_merge_size = 2"),
    (with_value("patch_merge", "vision_encoder", "mm_projector_id"), 'mm_projector_id = "patch_merge"'),
    (with_value(True, "vision_encoder", "add_pre_mm_projector_layer_norm"), "pre_mm_projector_layer_norm = true"),
    (with_value({"factor": 16}, "yarn"), 'yarn = {"factor": 16}'),
    (with_value({"beta": 0.1}, "llama_4_scaling"), 'llama_4_scaling = {"beta": 0.1}'),
    (with_value({"type": "linear"}, "rope_scaling"), 'rope_scaling = {"type": "linear"}'),
    (with_value(True, "tied_embeddings"), "tied_embeddings = true"),
    (with_value(4096, "sliding_window"), "sliding_window = 4096"),
    (with_value({"num_experts": 8}, "moe"), "moe = "),
    (with_value({"qformat_weight": "fp8_e4m3"}, "quantization"), "already quantized"),
    (with_value(3, "n_kv_heads"), "4 query heads cannot share 3 kv heads"),
    (with_value(33, "head_dim"), "head_dim 33 is odd"),
    (with_value(8, "vision_encoder", "image_size"), "image_size 8 is less than patch_size 16"),
    (with_value(32, "vision_encoder", "num_attention_heads"), "head_dim 2 is no multiple of 4"),
    (with_value(5, "vision_encoder", "num_attention_heads"), "does not divide into 5 heads"),
    (with_value(12, "vision_encoder", "image_token_id"), "not three different"),
    (with_value(999, "vision_encoder", "image_end_token_id"), "not all below vocab_size 512"),
    (with_value(-1, "vision_encoder", "image_break_token_id"), "'vision_encoder.image_break_token_id' is -1"),
    (with_value("96", "dim"), "'dim' is \"96\", expected a whole number"),
    (with_value(True, "dim"), "'dim' is true"),
    (with_value(0, "rope_theta"), "'rope_theta' is 0, expected a positive number"),
    (with_value("no", "vision_encoder", "adapter_bias"), "expected true or false"),
    (with_value([], "vision_encoder"), "expected an object"),
    (without("vision_encoder"), "no 'vision_encoder'"),
    (without("rope_theta"), "'rope_theta' is absent"),
    (without("vision_encoder", "image_token_id"), "'vision_encoder.image_token_id' is absent"),
]


@pytest.mark.parametrize(("change", "named"), MISTRAL_REFUSED, ids=[named for _, named in MISTRAL_REFUSED])
def test_mistral_configurations_that_cannot_run_are_refused_by_key(mistral: Path, change: Change, named: str) -> None:
    edit_json(mistral / "params.json", change)
    message = str(refusal(mistral))
    assert named in message and "params.json" in message


YARN = {"rope_type": "yarn", "rope_theta": 1e6}
HF_REFUSED = [
    (with_value("mistral3", "model_type"), 'model_type = "mistral3"'),
    (with_value("llama", "text_config", "model_type"), 'text_config.model_type = "llama"'),
    (with_value("siglip", "vision_config", "model_type"), 'vision_config.model_type = "siglip"'),
    (with_value(2, "spatial_merge_size"), "spatial_merge_size = 2"),
    (with_value(-2, "vision_feature_layer"), "vision_feature_layer = -2"),
    (without("vision_feature_layer"), "vision_feature_layer = -2 (absent, so the default)"),
    (with_value("default", "vision_feature_select_strategy"), 'vision_feature_select_strategy = "default"'),
    (with_value("gelu_new", "projector_hidden_act"), 'projector_hidden_act = "gelu_new"'),
    (with_value(True, "tie_word_embeddings"), "tie_word_embeddings = true"),
    (with_value(True, "text_config", "tie_word_embeddings"), "text_config.tie_word_embeddings = true"),
    (with_value(4096, "text_config", "sliding_window"), "text_config.sliding_window = 4096"),
    (without("text_config", "sliding_window"), "text_config.sliding_window = 4096 (absent"),
    (with_value("gelu", "text_config", "hidden_act"), 'text_config.hidden_act = "gelu"'),
    (with_value({"type": "yarn"}, "text_config", "rope_scaling"), 'text_config.rope_scaling = {"type": "yarn"}'),
    (with_value(YARN, "text_config", "rope_parameters"), 'text_config.rope_parameters.rope_type = "yarn"'),
    (with_value({"quant_method": "fp8"}, "quantization_config"), "already quantized (fp8)"),
    (with_value(32, "vision_config", "head_dim"), "vision_config.head_dim = 32"),
    (without("text_config"), "no 'text_config'"),
    (without("image_token_index"), "'image_token_index' is absent"),
]


@pytest.mark.parametrize(("change", "named"), HF_REFUSED, ids=[named for _, named in HF_REFUSED])
def test_hf_configurations_that_cannot_run_are_refused_by_key(hf: Path, change: Change, named: str) -> None:
    edit_json(hf / "config.json", change)
    message = str(refusal(hf))
    assert named in message and "config.json" in message


# Tokenizers


def test_a_missing_tokenizer_is_replaced_only_for_pixtrals_vocabulary(mistral: Path) -> None:
    (mistral / "tekken.json").unlink()
    error = refusal(mistral)
    assert "no tekken.json" in str(error) and str(mistral) in error.hint
    real = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=131_072))
    path, warnings = find_tokenizer(mistral, real)
    assert path.name == "tekken_240911.json" and path.is_file()
    assert len(warnings) == 1 and "tekken_240911.json" in warnings[0]
    shutil.copyfile(path, mistral / "tekken.json")
    assert find_tokenizer(mistral, real) == (mistral / "tekken.json", ())


def test_a_tokenizer_larger_than_the_model_is_refused(mistral: Path) -> None:
    edit_json(mistral / "tekken.json", lambda data: data["config"].update(default_vocab_size=513))
    assert "513 tokens, the model only 512" in str(refusal(mistral))
    edit_json(mistral / "tekken.json", lambda data: data["config"].update(default_vocab_size=500))
    assert open_checkpoint(mistral).tokenizer == mistral / "tekken.json"  # a padded embedding is common
    edit_json(mistral / "tekken.json", lambda data: data.pop("config"))
    assert "no tekken tokenizer" in str(refusal(mistral))


def test_image_ids_must_be_those_of_the_tokenizer(mistral: Path) -> None:
    names = {10: "[IMG]", 14: "[IMG_BREAK]", 15: "[IMG_END]"}
    tokens = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in names.items()]
    edit_json(mistral / "tekken.json", lambda data: data.update(special_tokens=tokens))
    assert "10, 14, 15; the model's configuration 10, 12, 13" in str(refusal(mistral))
    ids = {"image_break_token_id": 14, "image_end_token_id": 15}
    edit_json(mistral / "params.json", lambda data: data["vision_encoder"].update(ids))
    assert open_checkpoint(mistral).config.image_tokens == ImageTokens(10, 14, 15)


# Hub


class Hub:
    """A hub of one repository, in place of `snapshot_download`. Records what is asked for."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        self.cache.mkdir(exist_ok=True)
        for file in self.remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, self.cache / file.name)
        return str(self.cache)

    @property
    def downloaded(self) -> set[str]:
        return {file.name for file in self.cache.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_local_folder_is_used_as_it_is(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_checkpoint("owner/name") == Path("owner/name")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert not hub.asked


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/no/such", "./name", "../owner/name", "owner/", "/name", ""])
def test_other_sources_are_no_folder(hub: Hub, source: str, tmp_path: Path) -> None:
    if source == "":
        assert resolve_checkpoint(source) == Path()  # the working folder, as everywhere in pathlib
        return
    with pytest.raises(InputError, match="no such folder"):
        resolve_checkpoint(source)
    assert not hub.asked


def test_of_two_formats_only_the_mistral_weights_are_downloaded(hub: Hub) -> None:
    write_checkpoint(hub.remote, CONFIG)
    write_checkpoint(hub.remote, CONFIG, format="hf", shards=2)
    (hub.remote / "README.md").touch()
    folder = resolve_checkpoint("owner/name", revision="v1")
    assert set(hub.asked) == {("owner/name", "v1")}
    assert hub.downloaded == {
        "consolidated.safetensors", "params.json", "tekken.json", "config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert open_checkpoint(folder).format == "mistral"


@pytest.mark.parametrize("has_params", [False, True])
def test_hf_weights_are_downloaded_where_there_are_no_others(hub: Hub, has_params: bool) -> None:
    write_checkpoint(hub.remote, CONFIG, format="hf-new", shards=2)
    if has_params:
        (hub.remote / "params.json").write_text("{}", encoding="utf-8")
    checkpoint: Checkpoint = open_checkpoint(resolve_checkpoint("owner/name"))
    assert checkpoint.format == "hf-new" and len(checkpoint.files) == 2


def answer(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "kind", "message", "hint"),
    [
        (hub_errors.GatedRepoError("x", response=answer(403)), InputError, "licence", "hf auth login"),
        (hub_errors.HfHubHTTPError("x", response=answer(401)), InputError, "licence", "huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError("x", response=answer(404)), InputError, "no such public", "spelling"),
        (hub_errors.RevisionNotFoundError("x", response=answer(404)), InputError, "no revision 'v1'", "commits"),
        (hub_errors.HFValidationError("x"), InputError, "no valid hub id", "OWNER/NAME"),
        (hub_errors.HfHubHTTPError("503 Server Error", response=answer(503)), MachineError, "503", "hf download"),
        (hub_errors.LocalEntryNotFoundError("down\nmore"), MachineError, r"reached \(down\)", "hf download owner/name"),
        (hub_errors.OfflineModeIsEnabled("offline"), MachineError, r"reached \(offline\)", "pixtral export FOLDER"),
        (hub_errors.HTTPError(""), MachineError, r"reached \(HTTPError\)", "hf download"),  # type: ignore[attr-defined]
        (TimeoutError(), MachineError, r"reached \(TimeoutError\)", "hf download"),
        (OSError(28, "No space left on device"), MachineError, "no disk space", "HF_HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_failures_become_errors_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[InputError], message: str, hint: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        resolve_checkpoint("owner/name", revision="v1")
    assert hint in caught.value.hint and "owner/name" in str(caught.value)


def test_offline_the_hub_library_itself_ends_in_a_machine_error(tmp_path: Path) -> None:
    code = (
        "from pixtral_export.hub import resolve_checkpoint\n"
        "from pixtral_runtime.errors import MachineError\n"
        "try:\n    resolve_checkpoint('owner/name')\n"
        "except MachineError as error:\n    print(error, error.hint, sep='|')"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "cannot be reached" in run.stdout and "hf download owner/name" in run.stdout
