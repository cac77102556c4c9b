"""Checkpoints whose weights are published as codes and scales, in each of their writers' words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import load as load_onnx
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

import pixtral_runtime.backends.ort_session as ort_session
from helpers.bundles import exported
from helpers.tiny import edit_json, edit_weights, refusal, tiny_config, write_checkpoint
from pixtral_export.checkpoint.reader import SPELLINGS, open_checkpoint
from pixtral_export.checkpoint.tensor_names import pairs_to_halves
from pixtral_export.model.parameters import parameters
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_export.weight_names import input_scale_name
from pixtral_runtime import load
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import SettingError
from pixtral_runtime.inputs.conversation import user_message
from publish_codes import publish

CONFIG = tiny_config()
SCHEMES = ("fp8", "fp8-dynamic", "w8a8", "w4a16")
FORMATS = ("mistral", "hf", "hf-new")
GROUP = 32
WQ = "layers.1.attention.wq.weight"
FILES = {"mistral": ("consolidated", "params.json"), "hf": ("model", "config.json"), "hf-new": ("model", "config.json")}


def published(folder: Path, scheme: str, format: str = "hf") -> Path:
    source = write_checkpoint(folder / "plain", CONFIG, format=format)
    publish(source, folder / scheme, scheme, GROUP)
    return folder / scheme


def by_hand(file: Path, weight: str) -> Tensor:
    """A weight as its writer's own program restores it: codes times scale, without our reader."""
    tensors, layer = load_file(file), weight.removesuffix("weight")
    if layer + "weight_packed" in tensors:
        words = tensors[layer + "weight_packed"].numpy().view(np.uint32)
        rows, columns = tensors[layer + "weight_shape"].tolist()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(rows, columns, 4)
        codes = torch.from_numpy(bits @ np.array([1, 2, 4, 8]) - 8.0).float()
        return codes * tensors[layer + "weight_scale"].float().repeat_interleave(GROUP, 1)
    spellings = ("qscale_weight", "weight_scale_inv", "weight_scale")
    scale = next(tensors[layer + word] for word in spellings if layer + word in tensors)
    return tensors[weight].float() * scale.float()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_read_as_codes_times_scales_in_every_format(scheme: str, format: str, tmp_path: Path) -> None:
    folder = published(tmp_path, scheme, format)
    plain, coded = open_checkpoint(tmp_path / "plain"), open_checkpoint(folder)
    assert coded.format == format and len(coded.codes) == 7 * CONFIG.decoder.n_layers
    file = folder / f"{FILES[format][0]}.safetensors"
    for parameter in parameters(CONFIG):
        seen, original = coded.read(parameter), plain.read(parameter)
        if parameter.name not in coded.codes:
            assert torch.equal(seen, original)
            continue
        expected = by_hand(file, SPELLINGS[format](parameter.name))
        if format == "mistral" and parameter.rotary_heads:
            expected = pairs_to_halves(expected, parameter.rotary_heads)
        assert seen.dtype == torch.float32 and torch.equal(seen, expected)
        error = (seen - original.float()).norm() / original.float().norm()
        assert 0 < error < (0.15 if scheme == "w4a16" else 0.04)


def as_stored(bundle: Bundle) -> dict[str, Tensor]:
    """The decoder's tensors as onnx reads them."""
    initializers = load_onnx(bundle.graph_path("decoder")).graph.initializer
    return {one.name: torch.from_numpy(numpy_helper.to_array(one).astype(np.float32)) for one in initializers}


def test_int4_keeps_the_codes_of_w4a16_bit_for_bit_without_samples(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(published(tmp_path, "w4a16"))
    bundle = exported(checkpoint.path, tmp_path / "bundle", ExportSettings(precision="int4"))
    assert bundle.quantization["method"] == "stored" and "samples" not in bundle.quantization
    tensors = as_stored(bundle)
    for parameter in parameters(CONFIG):
        if parameter.name in checkpoint.codes:
            scale = tensors[f"{parameter.name}_scale"].repeat_interleave(GROUP, 0)
            assert torch.equal(tensors[parameter.name] * scale, checkpoint.read(parameter).T)


def test_a_bundle_of_w4a16_answers_as_its_dequantized_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in float32, which ONNX Runtime rounds to int8 otherwise."""
    coded = open_checkpoint(published(tmp_path, "w4a16"))
    plain = tmp_path / "plain"
    spell = SPELLINGS[coded.format]

    def dequantize(weights: dict[str, Tensor]) -> None:
        weights |= {spell(p.name): coded.read(p).contiguous() for p in parameters(CONFIG) if p.name in coded.codes}

    edit_weights(plain / "model.safetensors", dequantize)
    open_graph = ort_session.open_graph
    monkeypatch.setattr(ort_session, "open_graph", lambda *a, **k: open_graph(*a, **k, accuracy_level=1))
    rest = ("vision_*=float32", "output=float32", "tok_embeddings=float32")
    settings = ExportSettings(dtype="float32", precision="int4", keep=rest)
    ours = load(exported(coded.path, tmp_path / "ours", settings).path)
    expected = load(exported(plain, tmp_path / "expected", ExportSettings(dtype="float32")).path)
    prompt = ours.prompts.build(user_message("What is this?"))
    logits = []
    for model in (ours, expected):
        cache = model.runner.sessions.decoder.new_cache(1, 64)
        logits.append(model.runner.prefill(prompt, model.runner.no_features, cache, all_logits=True))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert np.abs(logits[1]).max() > 1


@pytest.mark.parametrize("format", FORMATS)
def test_fp8_keeps_codes_and_scales_of_weights_and_inputs_without_samples(format: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(published(tmp_path, "fp8", format))
    bundle = exported(checkpoint.path, tmp_path / "bundle", ExportSettings(precision="fp8"))
    assert bundle.quantization["method"] == "stored" and not bundle.quantization["unquantized_inputs"]
    tensors = as_stored(bundle)
    for parameter in parameters(CONFIG):
        if parameter.name in checkpoint.codes:
            read = checkpoint.read_codes(parameter)
            assert torch.equal(tensors[parameter.name] * tensors[f"{parameter.name}_scale"], read.weight().T)
            of_input = checkpoint.codes[parameter.name].read_input_scale()
            assert of_input is not None and float(tensors[input_scale_name(parameter.name)]) == of_input
    vision = {one.name: one.data_type for one in load_onnx(bundle.graph_path("vision")).graph.initializer}
    assert not any(name.endswith("_scale") for name in vision), "the tower is published in floats, and stays in them"
    assert load(bundle.path).generate("What is this?", max_new_tokens=4).token_ids


@pytest.mark.parametrize(
    ("scheme", "settings", "method"),
    [
        ("fp8", ExportSettings(precision="int4", group_size=32), "gptq"),
        ("fp8", ExportSettings(precision="fp8", method="rtn"), "rtn"),
        ("fp8-dynamic", ExportSettings(precision="fp8"), "gptq"),  # no scales of inputs
        ("w4a16", ExportSettings(precision="int4", method="gptq"), "gptq"),
        ("w4a16", ExportSettings(precision="int4", group_size=32), "stored"),
        ("w4a16", ExportSettings(precision="fp8"), "gptq"),
        ("w8a8", ExportSettings(precision="int8"), "smoothquant"),
        ("w4a16", ExportSettings(), "rtn"),
    ],
)
def test_codes_are_kept_where_they_are_those_of_the_recipe(
    scheme: str, settings: ExportSettings, method: str, tmp_path: Path
) -> None:
    plan = plan_export(open_checkpoint(published(tmp_path, scheme)), replace(settings, max_context=64))
    assert plan.recipe.method == method
    assert plan.recipe.calibrated == (method != "stored" and settings.precision is not None)


def test_a_layer_that_is_kept_otherwise_is_made_of_the_dequantized_weight(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(published(tmp_path, "w4a16"))
    settings = ExportSettings(precision="int4", keep=(f"{WQ.removesuffix('.weight')}=float16",))
    tensors = as_stored(exported(checkpoint.path, tmp_path / "bundle", settings))
    parameter = next(p for p in parameters(CONFIG) if p.name == WQ)
    assert torch.equal(tensors[WQ], checkpoint.read(parameter).T.half().float()) and f"{WQ}_scale" not in tensors


@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        ("fp8-dynamic", ExportSettings(precision="fp8", method="stored"), "holds no codes of fp8"),
        ("w4a16", ExportSettings(precision="int4", method="stored", group_size=64), "holds no codes of int4"),
        (
            "w4a16",
            ExportSettings(precision="int4", calibration=Path()),
            "own codes needs no samples",
        ),
    ],
)
def test_wishes_that_the_codes_cannot_fulfil_are_refused(
    scheme: str, settings: ExportSettings, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=words):
        plan_export(open_checkpoint(published(tmp_path, scheme)), settings)


def test_scales_that_the_bundle_cannot_hold_are_refused_and_not_rounded(tmp_path: Path) -> None:
    folder = published(tmp_path, "w4a16")
    name = SPELLINGS["hf"](WQ) + "_scale"
    edit_weights(folder / "model.safetensors", lambda weights: weights[name].mul_(2**-14))
    with pytest.raises(SettingError, match="scales that float16 does not hold exactly"):
        exported(folder, tmp_path / "bundle", ExportSettings(precision="int4"))
    exported(folder, tmp_path / "bundle", ExportSettings(precision="int4", dtype="float32"))


def with_settings(key: str, value: Any, *path: str) -> Any:
    def change(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        for step in path:
            section = section[step]
        section[key] = value

    return change


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("fp8", with_settings("weight_block_size", [128, 128]), "weight_block_size = [128, 128]"),
        ("w4a16", with_settings("format", "nvfp4-pack-quantized"), 'format = "nvfp4-pack-quantized"'),
        ("w4a16", with_settings("format", "marlin-24"), 'format = "marlin-24"'),
        ("w4a16", with_settings("symmetric", False, *WEIGHTS), "weights.symmetric = false"),
        ("w4a16", with_settings("num_bits", 8, *WEIGHTS), "weights.num_bits = 8"),
        ("w4a16", with_settings("type", "float", *WEIGHTS), 'weights.type = "float"'),
        ("w4a16", with_settings("actorder", "group", *WEIGHTS), 'weights.actorder = "group"'),
        ("w4a16", with_settings("strategy", "channel", *WEIGHTS), 'weights.strategy = "channel"'),
        ("w8a8", with_settings("strategy", "block", *WEIGHTS), 'weights.strategy = "block"'),
        ("w8a8", with_settings("format", "mixed-precision"), 'format = "mixed-precision"'),
        ("w8a8", with_settings("quant_method", "awq"), "config_groups"),
        ("w8a8", lambda c: c.update(quantization_config={"quant_method": "modelopt"}), "(modelopt)"),
        ("w8a8", lambda c: c.update(quantization_config="gguf"), "(gguf)"),
    ],
)
def test_other_schemes_are_refused_by_name(scheme: str, change: Any, words: str, tmp_path: Path) -> None:
    folder = published(tmp_path, scheme)
    edit_json(folder / "config.json", change)
    if words == "config_groups":  # said twice, in two words: what it describes decides
        open_checkpoint(folder)
        return
    error = refusal(folder)
    assert "already quantized" in str(error) and words in str(error) and "original" in error.hint


def test_codes_that_no_configuration_speaks_of_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, "fp8", "mistral")
    edit_json(folder / "params.json", lambda config: config.pop("quantization"))
    assert "is already quantized: it holds 'layers.0.attention.w" in str(refusal(folder))


@pytest.mark.parametrize(
    ("word", "value", "seen"),
    [
        ("weight_scale_inv", None, "with 0 scales"),
        ("weight_scale_inv", torch.ones(3), "which does not fit codes"),
        ("activation_scale", torch.ones(2), "expected one scale"),
        ("weight_scale", torch.ones(()), "with 2 scales"),
    ],
)
def test_scales_that_do_not_fit_their_codes_are_named(
    word: str, value: Tensor | None, seen: str, tmp_path: Path
) -> None:
    folder = published(tmp_path, "fp8")
    layer = SPELLINGS["hf"](WQ).removesuffix("weight")

    def change(weights: dict[str, Tensor]) -> None:
        weights.pop(layer + word, None)
        if value is not None:
            weights[layer + word] = value

    edit_weights(folder / "model.safetensors", change)
    error = refusal(folder)
    assert seen in str(error) and layer in str(error)


def test_what_only_describes_a_cache_is_passed_over_and_a_lone_scale_is_not(tmp_path: Path) -> None:
    folder = published(tmp_path, "fp8", "mistral")
    file = folder / "consolidated.safetensors"
    extra = "vision_encoder.transformer.layers.0.attention.k_fake_quantizer.qscale_act"
    edit_weights(file, lambda weights: weights.update({extra: torch.ones(())}))
    open_checkpoint(folder)
    lone = "vision_encoder.transformer.layers.0.attention.wq.qscale_weight"
    edit_weights(file, lambda weights: weights.update({lone: torch.ones(())}))
    assert lone in str(refusal(folder))


def test_a_code_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, "fp8", "mistral")

    def spoil(weights: dict[str, Tensor]) -> None:
        weights[WQ].view(torch.uint8)[3, 5] = 0x7F

    edit_weights(folder / "consolidated.safetensors", spoil)
    with pytest.raises(Exception, match=f"'{WQ}' holds NaN"):
        exported(folder, tmp_path / "bundle", ExportSettings(precision="fp8"))


def test_layers_of_one_input_get_the_largest_of_their_scales(tmp_path: Path) -> None:
    folder = published(tmp_path, "fp8", "mistral")
    name = WQ.replace("wq.weight", "wk.qscale_act")
    edit_weights(folder / "consolidated.safetensors", lambda weights: weights[name].mul_(2))
    tensors = as_stored(exported(folder, tmp_path / "bundle", ExportSettings(precision="fp8")))
    largest, other = (float(tensors[f"layers.{n}.attention.input_scale"]) for n in (1, 0))
    assert largest == 2 * other


def test_the_cache_is_calibrated_over_codes_that_are_kept(tmp_path: Path) -> None:
    folder = published(tmp_path, "fp8")
    bundle = exported(folder, tmp_path / "bundle", ExportSettings(precision="fp8", kv_cache="int8"))
    assert bundle.quantization["method"] == "stored" and bundle.quantization["samples"]
    again = exported(folder, tmp_path / "again", ExportSettings(precision="fp8"))
    ours, theirs = as_stored(bundle), as_stored(again)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if name.startswith("layers."))
    assert json.loads((bundle.path / "bundle.json").read_bytes())["kv_cache"] == "int8"
