"""Which scheme each weight gets, and what a user's wish is refused for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.places import DEMO
from make_synthetic_checkpoint import pixtral_12b
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_export.quantization.recipes import Recipe, Scheme, check_patterns, make_recipe, stored_tensors
from pixtral_export.weights.plan import plan_weights, weight_file_bytes
from pixtral_runtime.bundle.manifest import Limits
from pixtral_runtime.errors import InputError, Remedy, SettingError

METHODS = {
    "float16": [],
    "int4": ["gptq", "awq", "rtn"],
    "int8": ["smoothquant"],
    "fp8": ["gptq", "rtn"],
    "nvfp4": ["gptq", "awq", "rtn"],
}
"""Of each precision, its own first."""
GROUP_SIZES = {"float16": [], "int4": [128, 64, 32], "int8": [], "fp8": [], "nvfp4": [16]}
LAYERS = {parameter.name.removesuffix(".weight"): parameter for parameter in parameters(pixtral_12b())}


def scheme(recipe: Recipe, layer: str) -> Scheme | None:
    return recipe.scheme(LAYERS[layer])


def test_int4_is_for_the_decoder_and_int8_for_the_rest() -> None:
    recipe = make_recipe("int4", "float16", group_size=64)
    assert scheme(recipe, "layers.39.feed_forward.w2") == Scheme("int4", 64)
    assert scheme(recipe, "vision_encoder.transformer.layers.0.attention.wq") == Scheme("int8")
    assert scheme(recipe, "vision_language_adapter.w_out") == Scheme("int8")
    assert scheme(recipe, "tok_embeddings") == scheme(recipe, "output") == Scheme("int8", 128)


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8", "nvfp4"])
def test_norms_biases_and_the_patch_convolution_are_never_quantized(precision: str) -> None:
    recipe = make_recipe(precision, "float16", keep=["*=int8"])
    for layer in ("layers.0.attention_norm", "norm", "vision_encoder.ln_pre", "vision_encoder.patch_conv"):
        assert scheme(recipe, layer) is None
    assert scheme(recipe, "vision_language_adapter.w_in.bias") is None


def test_the_first_pattern_that_fits_decides() -> None:
    keep = ["layers.0.attention.wq=float16", "layers.0.*=int8", "output=int4-32"]
    recipe = make_recipe("int4", "float16", keep=keep)
    assert scheme(recipe, "layers.0.attention.wq") is None
    assert scheme(recipe, "layers.0.attention.wk") == Scheme("int8")
    assert scheme(recipe, "layers.1.attention.wk") == Scheme("int4", 128)
    assert scheme(recipe, "output") == Scheme("int4", 32)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"precision": "int3"}, "precision=float16|int4|int8|fp8|nvfp4"),
        ({"precision": "int4", "group_size": 48}, "group_size=32|64|128"),
        ({"precision": "int4", "method": "magic"}, "method=gptq|awq|rtn"),
        ({"precision": "int4", "keep": ["output"]}, "keep="),
        ({"precision": "int4", "keep": ["output=int5"]}, "keep="),
        ({"precision": "int4", "keep": ["tok_embeddings=int4-32"]}, "keep=tok_embeddings=int8"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(settings: dict[str, object], hint: str) -> None:
    def ask() -> list[Scheme | None]:
        recipe = make_recipe(**settings, dtype="float16")  # type: ignore[arg-type]
        return [recipe.scheme(parameter) for parameter in LAYERS.values()]

    with pytest.raises(InputError) as caught:
        ask()
    assert hint in caught.value.hint


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


def follow(remedy: Remedy, settings: ExportSettings) -> ExportSettings:
    """The settings after one way out: `leave the method away`, or an option with the first of its values."""
    if isinstance(remedy, str):
        name = remedy.removeprefix("leave the ").removesuffix(" away").replace(" ", "_")
        return replace(settings, **{name: None})  # type: ignore[arg-type]
    value = remedy.value[0] if isinstance(remedy.value, tuple) else remedy.value
    return replace(settings, **{remedy.name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize(
    "samples", [{}, {"calibration": Path("photos")}, {"calibration_samples": 4}], ids=("none", "own", "few")
)
@pytest.mark.parametrize("group_size", [None, 16, 64, 48])
@pytest.mark.parametrize("method", [None, "gptq", "awq", "smoothquant", "rtn"])
@pytest.mark.parametrize("precision", list(METHODS))
def test_every_choice_is_followed_or_refused_by_name(
    precision: str,
    method: str | None,
    group_size: int | None,
    samples: dict[str, Path | int],
    kv_cache: str | None,
    demo: Checkpoint,
) -> None:
    settings = ExportSettings(
        precision=precision,
        method=method,
        group_size=group_size,
        kv_cache=kv_cache,
        **samples,  # type: ignore[arg-type]
    )
    sees_samples = (
        kv_cache is not None or (method or next(iter(METHODS[precision]), "rtn")) != "rtn" or precision == "fp8"
    )
    wrong = [
        words
        for words, is_wrong in (
            ("group size", group_size not in (None, *GROUP_SIZES[precision])),
            ("method", method not in (None, *METHODS[precision])),
            ("calibration", "calibration" in samples and not sees_samples),
            ("calibration samples", "calibration_samples" in samples and not sees_samples),
        )
        if is_wrong
    ]
    if wrong:
        with pytest.raises(SettingError) as caught:
            plan_export(demo, settings)
        wish = getattr(settings, wrong[0].replace(" ", "_"))
        assert f"{wrong[0]} {wish}" in str(caught.value)
        assert caught.value.remedies
        for remedy in caught.value.remedies:
            changed = follow(remedy, settings)
            try:
                plan_export(demo, changed)
            except SettingError as error:  # another wish may not fit either, but this one is settled
                assert f"{wrong[0]} {wish}" not in str(error)
        return
    plan = plan_export(demo, settings)
    recipe, layer = plan.recipe, Parameter("layers.0.attention.wq.weight", (128, 256))
    own = {
        name: next(iter(choices[precision]), None) for name, choices in (("method", METHODS), ("group", GROUP_SIZES))
    }
    assert recipe.method == (method or own["method"] or "rtn")
    scheme = recipe.scheme(layer)
    assert (None if scheme is None else scheme.group) == (group_size or own["group"])
    assert recipe.kv_cache == kv_cache
    assert recipe.calibrated == sees_samples
    assert plan.settings == settings


def test_calibration_is_planned_for(demo: Checkpoint) -> None:
    """GPTQ takes longer than rounding, and both make a bundle of the same size."""
    planned = [plan_export(demo, ExportSettings(precision="nvfp4", method=method)) for method in (None, "gptq", "rtn")]
    assert planned[0].seconds == planned[1].seconds > planned[2].seconds
    assert planned[0].bundle_bytes == planned[2].bundle_bytes


def test_a_pattern_that_others_have_left_nothing_is_refused() -> None:
    keep = ["layers.*=float16", "layers.0.*=int8"]
    with pytest.raises(InputError, match=r"pattern layers\.0\.\* would do nothing") as caught:
        check_patterns(make_recipe("int4", "float16", keep=keep), LAYERS.values())
    assert "first" in caught.value.hint
    check_patterns(make_recipe("int4", "float16", keep=keep[::-1]), LAYERS.values())


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    with pytest.raises(InputError, match="layer\\.0"):
        check_patterns(make_recipe("int4", "float16", keep=["layer.0.*=int8"]), LAYERS.values())


def test_a_group_that_nobody_chose_fits_each_layer() -> None:
    recipe = make_recipe("int4", "float16")
    widths = {512: 128, 576: 64, 96: 32}
    for width, group in widths.items():
        assert recipe.scheme(Parameter("layers.0.attention.wq.weight", (128, width))) == Scheme("int4", group)
    with pytest.raises(InputError, match="80 inputs"):
        recipe.scheme(Parameter("layers.0.attention.wq.weight", (128, 80)))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"group_size": 128}, "group_size=64"),
        ({"keep": ["layers.*=int4-128"]}, "keep=layers.0.attention.wq=int4-64"),
    ],
)
def test_a_chosen_group_that_does_not_divide_a_layer_is_refused_for_the_largest_that_does(
    settings: dict[str, object], hint: str
) -> None:
    recipe = make_recipe("int4", "float16", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="576 inputs") as caught:
        recipe.scheme(Parameter("layers.0.attention.wq.weight", (128, 576)))
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("precision", "bytes_a_weight"),  # of the decoder's 40 layers, scales included
    [("float16", 2), ("int8", 1), ("fp8", 1), ("int4", 1 / 2 + 2 / 128), ("nvfp4", 1 / 2 + 1 / 16)],
)
def test_sizes_of_the_12b(precision: str, bytes_a_weight: float) -> None:
    """Against the parameter counts of specification section 1.2."""
    tables, layers, vision = 2 * 131_072 * 5120, 12_247_782_400 - 2 * 131_072 * 5120, 403_489_792 + 31_467_520
    expected = layers * bytes_a_weight
    expected += 2 * (tables + vision) if precision == "float16" else tables * (1 + 2 / 128) + vision
    plan = plan_weights(pixtral_12b(), "float16", Limits(16_384, 1024), make_recipe(precision, "float16"))
    assert weight_file_bytes(plan) == pytest.approx(expected, rel=2e-3)


def test_a_quantized_layer_is_stored_as_codes_and_scales() -> None:
    wq = LAYERS["layers.0.attention.wq"]
    tensors = stored_tensors(wq, Scheme("int4", 128), "float16")
    assert [(t.name, t.shape, t.dtype, t.nbytes) for t in tensors] == [
        (wq.name, (5120, 4096), "int4", 5120 * 4096 // 2),
        (f"{wq.name}_scale", (40, 4096), "float16", 40 * 4096 * 2),
    ]
    assert [t.name for t in stored_tensors(wq, Scheme("int8", activation="int8"), "float16")] == [
        wq.name,
        f"{wq.name}_scale",
        "layers.0.attention.input_scale",
    ]
