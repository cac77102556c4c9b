"""LoRA adapters: merged as peft merges them, in either format over any checkpoint; what is no plain one is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Mistral3ForConditionalGeneration

from helpers.adapters import EVERY_KIND, RANK, peft_config, random_pairs, write_mistral_lora, write_peft
from helpers.family import MEMBERS
from helpers.tiny import edit_json, edit_weights, write_checkpoint
from pixtral_export.checkpoint.hub import open_source
from pixtral_export.checkpoint.lora import read_lora
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_export.checkpoint.tensor_names import hf_new_name
from pixtral_export.model.parameters import parameters
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.errors import CheckpointError, Option
from pixtral_runtime.files import sha256_of_file
from publish_codes import publish

CONFIG = MEMBERS["Ministral-3-8B"]
PAIRS = random_pairs(CONFIG)
WQ, WV = "layers.0.attention.wq.weight", "layers.1.attention.wv.weight"
MODULE = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
AB = ("lora_A", "lora_B")
FORMATS = ("mistral", "hf", "hf-new")


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {parameter.name: checkpoint.read(parameter) for parameter in parameters(checkpoint.config)}


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_lora(folder, CONFIG)
    assert caught.value.hint
    assert "download the checkpoint" not in caught.value.hint
    return caught.value


# Against peft


@pytest.mark.parametrize(
    ("member", "settings"),
    [
        ("Pixtral-Large", {"target_modules": "all-linear", "r": 8, "lora_alpha": 12}),
        ("Mistral-Small-3.1", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
        (
            "Ministral-3-8B",
            {
                "target_modules": ["q_proj", "k_proj", "down_proj", "linear_2", "merging_layer", "lm_head"],
                "rank_pattern": {
                    "layers.1.self_attn.q_proj": 3,
                    "vision_tower.*[qk]_proj": 2,
                    "^model.language_model.*.down_proj": 6,
                },
                "alpha_pattern": {"q_proj": 5, "language_model.layers.1.self_attn.q_proj": 9},
                "layers_to_transform": [1],
                "layers_pattern": "layers",
                "use_rslora": True,
            },
        ),
        ("Ministral-3-3B", {"target_modules": r".*(v_proj|linear_1)", "fan_in_fan_out": True}),
    ],
)
def test_merged_weights_are_pefts_to_the_bit(member: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = MEMBERS[member]
    base = write_checkpoint(tmp_path / "base", config, format="hf-new", dtype=torch.float32)
    kind: Any = Mistral3ForConditionalGeneration if config.adapter_norm else LlavaForConditionalGeneration
    torch.manual_seed(3)
    trained: Any = get_peft_model(kind.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    with torch.no_grad():
        for name, tensor in trained.named_parameters():
            if "lora_B" in name:  # zeros, where nothing has trained them
                tensor.normal_()
    trained.save_pretrained(tmp_path / "adapter")
    transposed = {"fan_in_fan_out": "fan_in_fan_out" in settings}  # peft saves what it makes of it, others do not
    edit_json(tmp_path / "adapter" / "adapter_config.json", lambda data: data.update(transposed))
    merged = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter"))
    state = merged.merge_and_unload().state_dict()
    plain = weights(open_checkpoint(base))
    seen = weights(open_source(str(base), lora=tmp_path / "adapter"))
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in seen.items()) >= 5
    for name, tensor in seen.items():
        assert torch.equal(tensor, state[hf_new_name(name)]), name


# Formats


@pytest.mark.parametrize("format", FORMATS)
def test_either_format_of_an_adapter_goes_with_every_format_of_a_checkpoint(format: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", CONFIG, format=format)
    plain = weights(open_checkpoint(base))
    settings = {"enable": True, "rank": RANK, "dropout": 0.1, "scaling": 2.0}  # as mistral-finetune writes them
    adapters = [write_mistral_lora(tmp_path / "mistral", CONFIG, PAIRS, settings)]
    adapters += [write_peft(tmp_path / family, PAIRS, format=family, lora_alpha=8) for family in ("hf", "hf-new")]
    for adapter in adapters:
        opened = open_source(str(base), lora=adapter)
        assert opened.lora is not None and set(opened.lora.deltas) == set(PAIRS) == set(EVERY_KIND)
        for name, seen in weights(opened).items():
            if name not in PAIRS:
                assert torch.equal(seen, plain[name])
                continue
            a, b = PAIRS[name]
            assert seen.dtype == torch.float32
            assert torch.equal(seen, plain[name].float() + (b @ a) * 2.0), name


def test_an_adapter_in_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    halves = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in PAIRS.items()}
    base = write_checkpoint(tmp_path / "base", CONFIG)
    seen = weights(open_source(str(base), lora=write_peft(tmp_path / "adapter", halves)))
    plain = weights(open_checkpoint(base))
    for name, (a, b) in halves.items():
        assert torch.equal(seen[name], plain[name].float() + (b.float() @ a.float()) * 2.0)


def test_an_adapter_is_merged_into_what_codes_stand_for_and_the_codes_are_not_kept(tmp_path: Path) -> None:
    publish(write_checkpoint(tmp_path / "plain", CONFIG, format="hf-new"), tmp_path / "base", "w4a16", 32)
    base, folder = str(tmp_path / "base"), write_peft(tmp_path / "adapter", PAIRS)
    coded, opened = open_source(base), open_source(base, lora=folder)
    plain, seen = weights(coded), weights(opened)
    assert coded.codes.keys() & PAIRS.keys()
    for name, (a, b) in PAIRS.items():
        assert torch.equal(seen[name], plain[name].float() + (b @ a) * 2.0)
    settings = ExportSettings(precision="int4")
    assert (plan_export(coded, settings).recipe.method, plan_export(opened, settings).recipe.method) == (
        "stored",
        "gptq",
    )


def test_the_scaling_of_mistrals_adapter_is_read(tmp_path: Path) -> None:
    lora = read_lora(write_mistral_lora(tmp_path, CONFIG, PAIRS, {"enable": True, "rank": 4, "scaling": 0.75}), CONFIG)
    assert {delta.scaling for delta in lora.deltas.values()} == {0.75}
    assert lora.warnings == ()


@pytest.mark.parametrize("is_there", [False, True])
def test_mistrals_adapter_without_a_scaling_gets_the_usual_one_and_a_warning(is_there: bool, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", CONFIG)
    folder = base if is_there else tmp_path / "adapter"  # beside the model's own params.json, or any
    write_mistral_lora(folder, CONFIG, PAIRS, None)
    opened = open_source(str(base), lora=folder)
    assert opened.lora is not None
    assert {delta.scaling for delta in opened.lora.deltas.values()} == {2.0}
    assert any("lora.safetensors" in warning and "assumed: 2.0" in warning for warning in opened.warnings)


def test_the_adapter_is_named_by_its_folder_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_peft(tmp_path / "receipts", PAIRS)
    monkeypatch.chdir(folder)
    for path in (folder, Path(".")):
        adapter = read_lora(path, CONFIG).id
        assert (adapter.name, adapter.sha256) == ("receipts", sha256_of_file(folder / "adapter_model.safetensors"))


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora = true is not implemented, only null or false is (this is a DoRA adapter)"),
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA"'),
        ({"peft_type": None}, "peft_type = null"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save = ["lm_head"]'),
        ({"bias": "lora_only"}, 'bias = "lora_only"'),
        ({"bias": "all"}, 'bias = "all"'),
        ({"lora_bias": True}, "lora_bias = true"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = [[0, 2], [1, 2]]"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [523, 3713]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights = "pissa_niter_16"'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights = "olora"'),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, 'init_lora_weights = "loftq"'),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow = 3"),
    ],
)
def test_what_is_more_than_a_sum_is_refused_by_its_key(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    error = refusal(write_peft(tmp_path, PAIRS, **change))
    assert words in str(error) and "adapter_config.json" in str(error)
    assert "merge_and_unload()" in error.hint


@pytest.mark.parametrize(
    "change",
    [
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": "lm_head", "task_type": "CAUSAL_LM", "revision": "main"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.05, "inference_mode": False},
        {"megatron_core": None, "loftq_config": None, "rank_pattern": None, "alpha_pattern": None},
    ],
)
def test_what_matters_in_training_only_is_read_over(change: dict[str, Any], tmp_path: Path) -> None:
    assert set(read_lora(write_peft(tmp_path, PAIRS, **change), CONFIG).deltas) == set(PAIRS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "'r' is 0"),
        ({"r": "4"}, "'r' is \"4\""),
        ({"lora_alpha": None}, "'lora_alpha' is absent"),
        ({"use_rslora": 1}, "'use_rslora' is 1"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is [\"q_proj\"], expected an object"),
        ({"rank_pattern": {"q_proj": -1}}, "'rank_pattern.q_proj' is -1"),
        ({"alpha_pattern": {"x{9999999999999}": 4}}, "is no regular expression"),
        ({"alpha_pattern": {"(": 4}}, "'alpha_pattern.(' is no regular expression"),
        ({"r": 8}, f"{MODULE}.lora_A.weight: expected (8, 96), seen (4, 96)"),
        ({"rank_pattern": {"q_proj": 2}}, "of another shape or rank"),
    ],
)
def test_a_configuration_that_does_not_go_with_the_tensors_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in str(refusal(write_peft(tmp_path, PAIRS, **change)))


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{MODULE}.lora_magnitude_vector.weight": torch.ones(128)}), "1 no LoRA of a layer"),
        (
            lambda t: t.update(
                {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.ones(4, 512)}
            ),
            "embed_tokens.lora_embedding_A (4, 512)",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(512, 96)}), "lm_head.weight (512, 96)"),
        (lambda t: t.pop(f"{MODULE}.lora_B.weight"), f"without their other half: {MODULE}.lora_A.weight"),
        (lambda t: t.pop(f"{MODULE}.lora_A.weight"), f"without their other half: {MODULE}.lora_B.weight"),
        (lambda t: t.update({f"{MODULE}.lora_A.weight": torch.ones(4, 64)}), "expected (4, 96), seen (4, 64)"),
        (lambda t: t.update({f"{MODULE}.lora_B.weight": torch.ones(128, 3)}), "expected (128, 4), seen (128, 3)"),
        (lambda t: t.update({f"{MODULE}.lora_B.weight": torch.ones(())}), "expected (128, 4), seen ()"),
        (lambda t: t.update({f"{MODULE}.base_layer.weight": torch.ones(9, 96)}), "expected (128, 96), seen (9, 96)"),
        (
            lambda t: t.update(
                {f"base_model.model.model.layers.7.mlp.experts.{p}.weight": torch.ones(4, 4) for p in AB}
            ),
            "of layers that this model does not have: base_model.model.model.layers.7.mlp.experts",
        ),
        (
            lambda t: t.update(
                {f"base_model.model.model.vision_tower.patch_conv.{p}.weight": torch.ones(4, 4) for p in AB}
            ),
            "of layers that are not linear: base_model.model.model.vision_tower.patch_conv",
        ),
        (
            lambda t: t.update(
                {
                    f"base_model.model.language_model.model.layers.0.self_attn.q_proj.{p}.weight": torch.ones(4)
                    for p in AB
                }
            ),
            "1 of layers that are there by another name as well: base_model.model.",
        ),
        (lambda t: t[f"{MODULE}.lora_A.weight"].fill_(math.nan), f"'{MODULE}.lora_A.weight' holds values that are not"),
        (lambda t: t[f"{MODULE}.lora_B.weight"].fill_(math.inf), f"'{MODULE}.lora_B.weight' holds values that are not"),
        (lambda t: t.update({f"{MODULE}.lora_A.weight": torch.ones(4, 96, dtype=torch.float64)}), "stored as F64"),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_tensors_that_cannot_be_merged_are_named(change: Change, words: str, tmp_path: Path) -> None:
    folder = write_peft(tmp_path, PAIRS)
    edit_weights(folder / "adapter_model.safetensors", change)
    error = refusal(folder)
    assert words in str(error) and "adapter_model.safetensors" in str(error)


def test_an_adapter_of_another_model_is_refused_by_what_does_not_fit(tmp_path: Path) -> None:
    error = refusal(write_peft(tmp_path, random_pairs(MEMBERS["Pixtral-Large"], [WQ])))
    assert f"{MODULE}.lora_A.weight: expected (4, 96), seen (4, 128)" in str(error)
    assert error.hint.startswith("take the checkpoint that the adapter was trained on")


def test_a_head_that_is_the_embeddings_as_well_is_refused(tmp_path: Path) -> None:
    folder = write_peft(tmp_path, random_pairs(CONFIG, ["output.weight"]))
    assert set(read_lora(folder, CONFIG).deltas) == {"output.weight"}
    tied = MEMBERS["Ministral-3-3B"]
    with pytest.raises(CheckpointError, match=r"shares its weights with the embeddings: base_model\.model\.lm_head"):
        read_lora(folder, tied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({"layers.0.attention_norm.weight": torch.ones(96)}),
            "layers.0.attention_norm.weight (96,)",
        ),
        (
            lambda t: t.update({f"layers.2.attention.wq.{part}.weight": torch.ones(4, 4) for part in AB}),
            "does not have",
        ),
        (lambda t: t.pop("layers.0.attention.wq.lora_B.weight"), "without their other half"),
    ],
)
def test_mistrals_tensors_are_checked_as_well(change: Change, words: str, tmp_path: Path) -> None:
    folder = write_mistral_lora(tmp_path, CONFIG, PAIRS, {"enable": True, "rank": RANK, "dropout": 0.0, "scaling": 2.0})
    edit_weights(folder / "lora.safetensors", change)
    assert words in str(refusal(folder))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"enable": True, "rank": 64, "scaling": 2.0}, "expected (64, 96), seen (4, 96)"),
        ({"enable": False, "rank": 4, "scaling": 2.0}, "lora.enable = false"),
        ({"enable": True, "rank": 4, "scaling": 0}, "'lora.scaling' is 0"),
        ({"enable": True, "rank": 4}, "'lora.scaling' is absent"),
    ],
)
def test_mistrals_settings_are_checked(lora: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in str(refusal(write_mistral_lora(tmp_path, CONFIG, PAIRS, lora)))


def test_folders_that_hold_no_adapter_or_two_are_refused(tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", PAIRS)
    assert "holds two adapters" in str(refusal(write_mistral_lora(peft, CONFIG, PAIRS, None)))
    alone = tmp_path / "alone"
    alone.mkdir()
    (peft / "adapter_model.safetensors").rename(alone / "adapter_model.safetensors")
    assert "no adapter_config.json" in str(refusal(alone))
    (tmp_path / "config-only").mkdir()
    (peft / "adapter_config.json").rename(tmp_path / "config-only" / "adapter_config.json")
    for folder in (tmp_path / "config-only", write_checkpoint(tmp_path / "model", CONFIG)):
        assert "holds no adapter: neither" in str(refusal(folder))
    assert refusal(tmp_path / "nowhere").options == (Option("lora", "FOLDER"),)
    assert refusal(alone / "adapter_model.safetensors").options == (Option("lora", str(alone)),)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config()), encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "pickles, which can run any code when they are read (adapter_model.bin)" in str(refusal(tmp_path))


def test_damaged_files_are_named_with_a_remedy_for_adapters(tmp_path: Path) -> None:
    folder = write_peft(tmp_path, PAIRS)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = file.read_bytes()
    for broken, words in ((whole[:-9], "is cut off"), (whole[:20], "within its header"), (whole + b"12345678", "read")):
        file.write_bytes(broken)
        error = refusal(folder)
        assert words in str(error) and "copy the adapter again" in error.hint
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git-lfs pointer" in str(refusal(folder))
    config.write_text("{", encoding="utf-8")
    assert "broken JSON" in str(refusal(folder))
