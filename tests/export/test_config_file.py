"""Configuration files: what their keys mean, and what is refused by its key."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, Ministral3Config, Mistral3Config

from helpers.family import MEMBERS
from helpers.tiny import Change, edit_json, refusal, tiny_config, write_checkpoint
from make_synthetic_checkpoint import hf_config, params_json
from pixtral_export.checkpoint.hf_config import read_hf_config
from pixtral_export.checkpoint.mistral_config import read_mistral_config
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.parameters import parameters
from pixtral_export.model.rope import decoder_rope_tables, yarn_frequencies
from pixtral_runtime.bundle.config import ImageTokens, QueryScale, Yarn
from pixtral_runtime.errors import SettingError

CONFIG = tiny_config()
FORMATS = ("mistral", "hf", "hf-new")


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


def test_a_gelu_is_kept_where_it_is_asked_for(hf: Path, mistral: Path) -> None:
    edit_json(hf / "config.json", with_value("gelu", "text_config", "hidden_act"))
    error = refusal(hf)
    assert [option.name for option in error.options] == ["keep_activations"]
    edit_json(hf / "config.json", without("vision_config", "hidden_act"))  # gelu by transformers' default
    checkpoint = open_checkpoint(hf, keep_activations=True)
    assert (checkpoint.config.vision.hidden_act, checkpoint.config.decoder.hidden_act) == ("gelu", "gelu")
    assert not any("hidden_act" in warning for warning in checkpoint.warnings)
    with pytest.raises(SettingError, match=r"would do nothing: .*params\.json names none"):
        open_checkpoint(mistral, keep_activations=True)


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


@pytest.mark.parametrize("inner", [{}, {"rope_type": "default"}, {"type": "default"}])
def test_a_base_beside_rope_parameters_counts(hf: Path, inner: dict[str, Any]) -> None:
    """Where the object leaves it out, transformers takes the key of its older versions."""

    own = {"rope_theta": 1e6, "rope_parameters": inner}
    edit_json(hf / "config.json", lambda data: data["text_config"].update(own))
    assert read_hf_config(hf / "config.json")[0].decoder.rope_theta == 1e6


def test_head_dim_follows_from_the_heads_where_it_is_absent(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params_json(CONFIG)), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)), encoding="utf-8")
    edit_json(tmp_path / "config.json", with_value(None, "text_config", "head_dim"))
    assert read_mistral_config(edit_json(tmp_path / "params.json", without("head_dim")))[0].decoder.head_dim == 96 // 4
    assert read_hf_config(tmp_path / "config.json")[0].decoder.head_dim == 96 // 4


MERGING = json.loads(json.dumps(params_json(CONFIG)["vision_encoder"])) | {
    "spatial_merge_size": 2, "mm_projector_id": "patch_merge",
}  # fmt: skip
MISTRAL_YARN = {"factor": 16.0, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": False}

MISTRAL_REFUSED = [
    (with_value("patch_merge", "vision_encoder", "mm_projector_id"), 'mm_projector_id = "patch_merge"'),
    (with_value(2, "vision_encoder", "spatial_merge_size"), "vision_encoder.mm_projector_id = null"),
    (with_value(MERGING | {"mm_projector_id": "mean"}, "vision_encoder"), 'mm_projector_id = "mean"'),
    (with_value(MERGING | {"image_size": 240}, "vision_encoder"), "image_size 240 is no multiple of 32"),
    (with_value({"factor": 16}, "yarn"), "'yarn.original_max_position_embeddings' is absent"),
    (with_value(MISTRAL_YARN | {"apply_scale": True}, "yarn"), "yarn.apply_scale = true"),
    (with_value(MISTRAL_YARN | {"mystery": 1}, "yarn"), "yarn.mystery = 1"),
    (with_value(MISTRAL_YARN | {"factor": 0}, "yarn"), "'yarn.factor' is 0, expected a positive number"),
    (with_value({"beta": 0.1}, "llama_4_scaling"), "'llama_4_scaling.original_max_position_embeddings' is absent"),
    (with_value({"beta": 0.1, "power": 2}, "llama_4_scaling"), "llama_4_scaling.power = 2"),
    (with_value({"type": "linear"}, "rope_scaling"), 'rope_scaling = {"type": "linear"}'),
    (with_value("yes", "tied_embeddings"), "'tied_embeddings' is \"yes\", expected true or false"),
    (with_value(4096, "sliding_window"), "sliding_window = 4096"),
    (with_value({"num_experts": 8}, "moe"), "moe = "),
    (with_value({"qformat_weight": "fp8_e5m2"}, "quantization"), "already quantized (fp8_e5m2)"),
    (with_value({"quant_method": "bitsandbytes"}, "quantization_config"), "already quantized (bitsandbytes)"),
    (with_value({"num_experts": 8}, "moe"), "this is a mixture of experts"),
    (with_value(4, "vision_encoder", "num_channels"), "num_channels 4, and pictures have 3"),
    (with_value(250, "vision_encoder", "image_size"), "image_size 250 is no multiple of patch_size 16"),
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
    (with_value(10**400, "rope_theta"), "'rope_theta' is 1000"),
    (with_value(10**9, "n_layers"), "'n_layers' is 1000000000, expected a whole number from 1 to 1,000"),
    (with_value(2**40, "hidden_dim"), "expected a whole number from 1 to 16,777,216"),
    (with_value("x" * 5000, "dim"), "'dim' is \"xxx"),
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


THETA = {"rope_theta": 1e9}
NESTED: dict[str, Any] = {"full_attention": {"rope_type": "default", "rope_theta": 1e9}}
HALF = {"partial_rotary_factor": 0.5}


def without_base(section: str) -> Change:
    """`rope_parameters` that name the kind alone, as transformers 5 has them."""

    def change(data: dict[str, Any]) -> None:
        del data[section]["rope_theta"]
        data[section]["rope_parameters"] = {"rope_type": "default"}

    return change


YARN = {"rope_type": "yarn", "rope_theta": 1e6}
HF_REFUSED = [
    (with_value("voxtral", "model_type"), 'model_type = "voxtral"'),
    (with_value("ministral3", "text_config", "model_type"), 'text_config.model_type = "ministral3"'),
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
    (without_base("text_config"), "'text_config.rope_parameters.rope_theta' is absent, expected a positive number"),
    (without_base("vision_config"), "'vision_config.rope_parameters.rope_theta' is absent, expected a positive number"),
    (with_value({"type": "yarn"} | THETA, "text_config", "rope_parameters"), 'rope_parameters.type = "yarn"'),
    (with_value(NESTED | THETA, "text_config", "rope_parameters"), "rope_parameters.full_attention = {"),
    (with_value(HALF | THETA, "text_config", "rope_parameters"), "rope_parameters.partial_rotary_factor = 0.5"),
    (with_value(0.5, "text_config", "partial_rotary_factor"), "text_config.partial_rotary_factor = 0.5"),
    (with_value("quick_gelu", "vision_config", "hidden_act"), 'vision_config.hidden_act = "quick_gelu"'),
    (with_value(1, "vision_config", "num_channels"), "num_channels 1, and pictures have 3"),
    (with_value(100, "vision_config", "image_size"), "image_size 100 is no multiple of patch_size 16"),
    (with_value("mistral", "model_type"), "this is a model for text alone"),
    (with_value({"quant_method": "gptq"}, "quantization_config"), "already quantized (gptq)"),
    (with_value({"quant_method": "awq"}, "text_config", "quantization_config"), "text_config.quantization_config"),
    (with_value({"quant_method": "awq"}, "vision_config", "quantization_config"), "already quantized (awq)"),
    (with_value({"quant_method": "x"}, "text_config", "compression_config"), "already quantized (x)"),
    (with_value({"group_size": 64, "bits": 4}, "quantization"), "already quantized (quantization)"),  # MLX
    (with_value(32, "vision_config", "head_dim"), "vision_config.head_dim = 32"),
    (without("text_config"), "no 'text_config'"),
    (without("image_token_index"), "'image_token_index' is absent"),
]


@pytest.mark.parametrize(("change", "named"), HF_REFUSED, ids=[named for _, named in HF_REFUSED])
def test_hf_configurations_that_cannot_run_are_refused_by_key(hf: Path, change: Change, named: str) -> None:
    edit_json(hf / "config.json", change)
    message = str(refusal(hf))
    assert named in message and "config.json" in message


# The family's published configurations (specification sections 4.1, 4.2 and 4.4)

VISION_3 = {
    "hidden_size": 1024, "num_channels": 3, "image_size": 1540, "patch_size": 14, "rope_theta": 1e4,
    "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_token_id": 10,
    "image_break_token_id": 12, "image_end_token_id": 13, "adapter_bias": False, "spatial_merge_size": 2,
    "mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True,
}  # fmt: skip
TEXT_3 = {"head_dim": 128, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": 131_072}
YARN_3 = {
    "original_max_position_embeddings": 16_384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Ministral-3-3B": TEXT_3 | {
        "dim": 3072, "n_layers": 26, "hidden_dim": 9216, "rope_theta": 1e6, "tied_embeddings": True,
        "max_position_embeddings": 262_144, "vision_encoder": VISION_3,
        "yarn": YARN_3,
        "llama_4_scaling": {"original_max_position_embeddings": 16_384, "beta": 0.1},
    },
    "Ministral-3-14B": TEXT_3 | {
        "dim": 5120, "n_layers": 40, "hidden_dim": 16_384, "rope_theta": 1e9, "max_position_embeddings": 262_144,
        "vision_encoder": VISION_3,
        "yarn": YARN_3,
        "llama_4_scaling": {"original_max_position_embeddings": 16_384, "beta": 0.1},
    },
    "Devstral-Small-2": TEXT_3 | {
        "dim": 5120, "n_layers": 40, "hidden_dim": 32_768, "rope_theta": 1e8, "max_position_embeddings": 393_216,
        "vision_encoder": VISION_3,
        "yarn": {"original_max_position_embeddings": 8192, "factor": 48, "apply_scale": False, "beta": 32, "alpha": 1},
        "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    },
}  # fmt: skip
FREQUENCIES = {
    "Ministral-3-3B": {0: 1, 1: 0.80584219, 20: 0.0133352143, 32: 3.3823529e-4, 63: 7.755861e-8},
    "Ministral-3-14B": {0: 1, 1: 0.72339416, 20: 6.9777921e-4, 32: 1.97642354e-6, 63: 8.6398264e-11},
    "Devstral-Small-2": {0: 1, 1: 0.74989421, 20: 1.25680266e-3, 32: 2.08333e-6, 63: 2.77816965e-10},
}
"""Of the rotary angles, by their number (specification section 4.4)."""
SIZES = {"Ministral-3-3B": 3_849_090_048, "Ministral-3-14B": 13_945_031_680, "Devstral-Small-2": 24_011_361_280}
"""Parameters (specification section 4.5)."""


@pytest.mark.parametrize("member", list(PUBLISHED))
def test_published_members_of_the_family_are_read_as_they_are(member: str, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(PUBLISHED[member]), encoding="utf-8")
    config, _ = read_mistral_config(path)
    decoder = config.decoder
    assert decoder.yarn is not None and decoder.query_scale is not None
    assert sum(math.prod(p.shape) for p in parameters(config) if not p.copy_of) == SIZES[member]
    frequencies = yarn_frequencies(decoder, decoder.yarn)
    assert {n: float(frequencies[n]) for n in FREQUENCIES[member]} == pytest.approx(FREQUENCIES[member], rel=3e-6)
    length = decoder.query_scale.length
    cos, _, scaled, _ = decoder_rope_tables(decoder, 3 * length + 1)
    growth = (scaled / cos)[[0, length - 1, length, 3 * length], 1]
    assert growth.tolist() == pytest.approx([1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(4)])
    assert decoder.max_position == PUBLISHED[member]["max_position_embeddings"]
    assert (config.vision.token_edge, config.vision.max_grid) == (28, 110)


def test_a_head_of_its_own_counts_whatever_the_configuration_says(tmp_path: Path) -> None:
    """config.json of the 24B models leaves `tie_word_embeddings` out, whose default is true."""
    tied = MEMBERS["Ministral-3-3B"]
    folder = write_checkpoint(tmp_path / "own", replace(tied, decoder=replace(tied.decoder, tied_embeddings=False)))
    edit_json(folder / "params.json", with_value(True, "tied_embeddings"))
    opened = open_checkpoint(folder)
    assert not opened.config.decoder.tied_embeddings
    assert opened.tensors["output.weight"] != opened.tensors["tok_embeddings.weight"]
    opened = open_checkpoint(write_checkpoint(tmp_path / "tied", tied))
    assert opened.tensors["output.weight"] == opened.tensors["tok_embeddings.weight"]


def test_what_transformers_writes_of_the_family_is_read(tmp_path: Path) -> None:
    """With all defaults: Mistral-Small-3.1's sizes, then with the text model of Ministral 3 8B."""
    Mistral3Config().save_pretrained(tmp_path / "24b")
    small, _ = read_hf_config(tmp_path / "24b" / "config.json")
    assert (small.decoder.dim, small.decoder.hidden_dim, small.decoder.rope_theta) == (5120, 32_768, 1e9)
    assert small.decoder.yarn is None and small.decoder.query_scale is None
    assert (small.vision.patch_size, small.vision.image_size, small.vision.spatial_merge_size) == (14, 1540, 2)
    assert small.adapter_norm and not small.adapter_bias
    Mistral3Config(text_config=Ministral3Config()).save_pretrained(tmp_path / "8b")
    ministral, _ = read_hf_config(tmp_path / "8b" / "config.json")
    assert ministral.decoder.yarn == Yarn(16.0, 16_384) and ministral.decoder.query_scale == QueryScale(0.1, 16_384)
    assert (ministral.decoder.max_position, ministral.decoder.rope_theta) == (262_144, 1e6)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"mystery": 2}, "text_config.rope_parameters.mystery = 2"),
        ({"rope_type": "llama3"}, 'text_config.rope_parameters.rope_type = "llama3"'),
        ({"truncate": False}, "text_config.rope_parameters.truncate = false"),
        ({"factor": None}, "'text_config.rope_parameters.factor' is absent"),
        ({"mscale": "one"}, "'text_config.rope_parameters.mscale' is \"one\", expected a positive number"),
        ({"rope_theta": 1.0}, "rope_theta 1.0 is not above 1, as YaRN needs it"),
        (["yarn"], "'text_config.rope_parameters' is [\"yarn\"], expected an object"),
    ],
)
def test_other_rotary_settings_of_the_family_are_refused_by_key(
    rope: dict[str, Any] | list[str], named: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "c", MEMBERS["Ministral-3-8B"], format="hf-new")

    def change(data: dict[str, Any]) -> None:
        text = data["text_config"]
        text["rope_parameters"] = rope if isinstance(rope, list) else text["rope_parameters"] | rope

    edit_json(folder / "config.json", change)
    assert named in str(refusal(folder))


def test_queries_that_are_scaled_by_nothing_are_not_scaled(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", MEMBERS["Ministral-3-8B"], format="hf-new")
    edit_json(folder / "config.json", with_value(0.0, "text_config", "rope_parameters", "llama_4_scaling_beta"))
    assert open_checkpoint(folder).config.decoder.query_scale is None


@pytest.mark.parametrize("rope", [{"rope_theta": 1e6}, {"rope_theta": 1e6, "type": "default"}])
def test_plain_rotary_positions_of_the_family_need_no_kind(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", MEMBERS["Mistral-Small-3.1"], format="hf-new")
    edit_json(folder / "config.json", with_value(rope, "text_config", "rope_parameters"))
    decoder = open_checkpoint(folder).config.decoder
    assert (decoder.rope_theta, decoder.yarn) == (1e6, None)
