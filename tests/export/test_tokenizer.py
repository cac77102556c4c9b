"""Which tokenizer goes with a model, what mistral-common must make of it, and how large pictures it asks for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import SPECIAL, VOCABULARY, Change, edit_json, refusal, tiny_config
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.checkpoint.tokenizer import TokenizerFile, find_tokenizer
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.config import ImageTokens
from pixtral_runtime.errors import SettingError

CONFIG = tiny_config()
NAMES = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]",
]  # fmt: skip


def special_tokens(names: list[str]) -> list[dict[str, Any]]:
    """As newer files list them, each with its rank."""
    rest = [f"<SPECIAL_{rank}>" for rank in range(len(names), SPECIAL)]
    return [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names + rest)]


def renamed(old: str, new: str) -> list[str]:
    """NAMES with two of them in each other's place."""
    return [{old: new, new: old}.get(name, name) for name in NAMES]


def test_a_missing_tokenizer_is_replaced_only_for_pixtrals_vocabulary(mistral: Path) -> None:
    (mistral / "tekken.json").unlink()
    error = refusal(mistral)
    assert "no tekken.json" in str(error) and str(mistral) in error.hint
    real = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=131_072))
    found = find_tokenizer(mistral, real)
    assert found.path.name == "tekken_240911.json" and found.path.is_file() and found.image is None
    assert len(found.warnings) == 1 and "tekken_240911.json" in found.warnings[0]
    shutil.copyfile(found.path, mistral / "tekken.json")
    own = find_tokenizer(mistral, real)
    assert own == TokenizerFile(mistral / "tekken.json", own.image) and own.image is not None
    assert (own.image.image_patch_size, own.image.max_image_size) == (16, 1024)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_a_sentencepiece_tokenizer_is_named(mistral: Path, name: str) -> None:
    (mistral / name).write_bytes(b"\n\x0e\n\x05<unk>")
    assert open_checkpoint(mistral).tokenizer.name == "tekken.json"  # beside its successor it does no harm
    (mistral / "tekken.json").unlink()
    assert f"SentencePiece tokenizer without pictures ({name})" in str(refusal(mistral))


def test_a_tokenizer_larger_than_the_model_is_refused(mistral: Path) -> None:
    edit_json(mistral / "tekken.json", lambda data: data["config"].update(default_vocab_size=513))
    assert "513 tokens, the model only 512" in str(refusal(mistral))
    edit_json(mistral / "tekken.json", lambda data: data["config"].update(default_vocab_size=500))
    assert open_checkpoint(mistral).tokenizer == mistral / "tekken.json"  # a padded embedding is common
    edit_json(mistral / "tekken.json", lambda data: data.pop("config"))
    assert "no tekken tokenizer" in str(refusal(mistral))


def test_image_ids_must_be_those_of_the_tokenizer(mistral: Path) -> None:
    tokens = special_tokens([*NAMES[:12], "[PREFIX]", "[MIDDLE]", "[IMG_BREAK]", "[IMG_END]", "[SUFFIX]"])
    edit_json(mistral / "tekken.json", lambda data: data.update(special_tokens=tokens))
    assert "10, 14, 15; the model's configuration 10, 12, 13" in str(refusal(mistral))
    ids = {"image_break_token_id": 14, "image_end_token_id": 15}
    edit_json(mistral / "params.json", lambda data: data["vision_encoder"].update(ids))
    assert open_checkpoint(mistral).config.image_tokens == ImageTokens(10, 14, 15)


def test_other_ends_of_an_answer_are_refused(mistral: Path) -> None:
    tokens = special_tokens(renamed("</s>", "[INST]"))
    edit_json(mistral / "tekken.json", lambda data: data.update(special_tokens=tokens))
    assert "gives <s>, </s> the ids 1, 3, expected 1, 2" in str(refusal(mistral))


REJECTED: dict[str, Change] = {
    "no version": lambda data: data["config"].pop("version"),
    "unknown version": lambda data: data["config"].update(version="v99"),
    "no images in v2": lambda data: data["config"].update(version="v2"),
    "no vocabulary": lambda data: data.pop("vocab"),
    "short vocabulary": lambda data: data.update(vocab=data["vocab"][:100]),
    "wrong rank": lambda data: data["vocab"][7].update(rank=70),
    "wrong byte": lambda data: data["vocab"][7].update(token_bytes="AAAA"),
    "no base64": lambda data: data["vocab"][300].update(token_bytes="A"),
    "no pattern": lambda data: data["config"].pop("pattern"),
    "broken pattern": lambda data: data["config"].update(pattern="("),
    "doubled token": lambda data: data.update(special_tokens=special_tokens(["<s>", *NAMES[1:]])),
    "no [INST]": lambda data: data.update(special_tokens=special_tokens([*NAMES[:3], "[A]", *NAMES[4:]])),
    "no list": lambda data: data.update(special_tokens=7),
    "newer without list": lambda data: data["config"].update(version="v11"),
    "two words for images": lambda data: data.update(multimodal={"max_image": 1}),
    "patch of 0": lambda data: data["image"].update(image_patch_size=0),
}


@pytest.mark.parametrize("change", REJECTED.values(), ids=REJECTED)
def test_a_tokenizer_that_mistral_common_rejects_is_refused(mistral: Path, change: Change) -> None:
    edit_json(mistral / "tekken.json", change)
    error = refusal(mistral)
    assert f"{mistral / 'tekken.json'} is no tokenizer that mistral-common can use: " in str(error)
    assert "came with the weights" in error.hint


# How large pictures are


def test_the_tokenizers_own_picture_size_is_obeyed_with_a_warning(mistral: Path) -> None:
    assert not any("pictures" in warning for warning in open_checkpoint(mistral).warnings)
    edit_json(mistral / "tekken.json", lambda data: data["image"].update(max_image_size=64))
    checkpoint = open_checkpoint(mistral)
    assert checkpoint.image_side == 64
    (warning,) = [warning for warning in checkpoint.warnings if "pictures" in warning]
    assert "tekken.json" in warning and "image.max_image_size = 64" in warning and "256" in warning
    assert plan_export(checkpoint, ExportSettings()).limits.max_image_side == 64
    assert plan_export(checkpoint, ExportSettings(max_image_side=128)).limits.max_image_side == 128  # asked for


def test_the_older_word_and_params_json_are_obeyed_too(mistral: Path) -> None:
    edit_json(mistral / "tekken.json", lambda data: data.update(multimodal=data.pop("image") | {"max_image_size": 128}))
    assert open_checkpoint(mistral).image_side == 128
    edit_json(mistral / "params.json", lambda data: data["vision_encoder"].update(max_image_size=96))
    assert open_checkpoint(mistral).image_side == 96


PREPROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "PixtralImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "patch_size": {"height": 16, "width": 16},
    "processor_class": "PixtralProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 256},
}  # fmt: skip


def test_transformers_own_file_is_obeyed_as_transformers_does(hf: Path) -> None:
    file = hf / "preprocessor_config.json"
    file.write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    assert open_checkpoint(hf).image_side == 256
    edit_json(file, lambda data: data.update(size={"longest_edge": 128}, patch_size=16))
    assert open_checkpoint(hf).image_side == 128
    nested = {"image_processor": PREPROCESSOR | {"size": {"longest_edge": 64}}, "processor_class": "PixtralProcessor"}
    (hf / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")  # transformers 5, and it goes first
    assert open_checkpoint(hf).image_side == 64
    assert any("image_processor.size.longest_edge = 64" in warning for warning in open_checkpoint(hf).warnings)
    (hf / "processor_config.json").write_text('{"patch_size": 16, "image_token": "[IMG]"}', encoding="utf-8")
    assert open_checkpoint(hf).image_side == 128
    edit_json(file, lambda data: data.update(image_std=[0.5, 0.5, 0.5]))
    assert "image_std = [0.5, 0.5, 0.5] is not implemented" in str(refusal(hf))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("tekken.json", lambda data: data["image"].update(max_image_size=1024), "image.max_image_size = 1024"),
        ("tekken.json", lambda data: data["image"].update(max_image_size=8), "image.max_image_size = 8"),
        ("tekken.json", lambda data: data["image"].update(image_patch_size=14), "spatial_merge_size = 14"),
        ("tekken.json", lambda data: data["image"].update(spatial_merge_size=2), "spatial_merge_size = 32"),
        ("params.json", lambda data: data["vision_encoder"].update(max_image_size=1540), "max_image_size = 1540"),
        ("params.json", lambda data: data["vision_encoder"].update(max_image_size="x"), 'max_image_size\' is "x"'),
    ],
)
def test_pictures_that_the_encoder_cannot_read_are_refused(
    mistral: Path, name: str, change: Change, named: str
) -> None:
    edit_json(mistral / name, change)
    assert named in str(refusal(mistral)) and name in str(refusal(mistral))


def test_a_side_that_is_no_multiple_of_the_patch_is_refused_with_the_next_one(mistral: Path) -> None:
    """A picture of 100 px has 7 patches of 16: engines and buffers of 100 // 16 = 6 would not take it."""
    with pytest.raises(SettingError, match="100 px is no multiple of the 16 px") as caught:
        plan_export(open_checkpoint(mistral), ExportSettings(max_image_side=100))
    assert [option.value for option in caught.value.options] == [96]
    edit_json(mistral / "tekken.json", lambda data: data["image"].update(max_image_size=100))
    with pytest.raises(SettingError, match="100 px"):
        plan_export(open_checkpoint(mistral), ExportSettings())


@pytest.mark.parametrize("count", [10**9, 10**18, -1, 0, VOCABULARY, "32", None])
def test_special_tokens_without_number_are_refused_before_they_are_made(mistral: Path, count: object) -> None:
    edit_json(mistral / "tekken.json", lambda data: data["config"].update(default_num_special_tokens=count))
    assert f"{count} special tokens among {VOCABULARY}" in str(refusal(mistral))
