"""`pixtral plan`: predictions against what bundles, caches and engines really take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helpers.bundles import export_tiny, exported
from helpers.places import DEMO
from make_synthetic_checkpoint import pixtral_12b
from pixtral_cli.main import app
from pixtral_cli.output import remedy_text
from pixtral_export.plan import ExportSettings
from pixtral_runtime import load
from pixtral_runtime.backends.ort_caches import OrtCache
from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES, KnownDevice
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.bundle.manifest import Limits
from pixtral_runtime.bundle.recipe_costs import packaged_costs
from pixtral_runtime.errors import Option

BYTES = {"float16": 25_372_000_000, "int8": 12_700_000_000, "fp8": 12_700_000_000, "int4": 7_430_000_000}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan(*arguments: object) -> dict[str, Any]:
    done = invoke("plan", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def footprint(precision: str, cache_bytes: int = 163_840) -> Footprint:
    return Footprint(pixtral_12b(), "float16", precision, Limits(16_384, 1024), BYTES, cache_bytes)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(DEMO, tmp_path_factory.mktemp("plan") / "b")


@pytest.mark.parametrize("options", [(), ("--precision", "int4"), ("--precision", "fp8", "--kv-cache", "int8")])
def test_the_predicted_bundle_is_the_one_that_export_writes(options: Sequence[str], tmp_path: Path) -> None:
    predicted = plan(DEMO, *options, "--context", 512)
    made = ("--max-context", 512, *(("--calibration-samples", 2) if options else ()), "--json")
    done = invoke("export", DEMO, "-o", tmp_path / "b", *options, *made)
    assert done.exit_code == 0, done.stderr
    written = json.loads(done.stdout)["bundle_bytes"]
    weights = predicted["devices"][0]["weight_bytes"]
    assert weights == pytest.approx((tmp_path / "b" / "weights.bin").stat().st_size, rel=0.001)
    assert predicted["bundle_bytes"] == pytest.approx(written, rel=0.03)
    assert predicted["engine_bytes"] == weights  # engines of it: scripts/check_engines.py
    assert plan(tmp_path / "b")["devices"][0]["weight_bytes"] == weights
    assert plan(tmp_path / "b")["kv_cache_bytes_per_token"] == predicted["kv_cache_bytes_per_token"]


def test_the_predicted_cache_is_the_one_the_runtime_makes(bundle: Path) -> None:
    cache = load(bundle).runner.sessions.decoder.new_cache(3, 512)
    assert isinstance(cache, OrtCache)
    seen = sum(keys.nbytes + values.nbytes for keys, values in cache.layers())
    assert plan(bundle, "--context", 512, "--batch", 3)["devices"][0]["kv_cache_bytes"] == seen


def test_the_largest_context_and_batch_are_where_it_stops_fitting() -> None:
    print_ = footprint("int4")
    for device in KNOWN_DEVICES.values():
        batch, context = print_.largest_batch(device, 4096), print_.largest_context(device, 2)
        assert print_.fits(device, 4096, batch) and not print_.fits(device, 4096, batch + 1)
        assert print_.fits(device, context, 2)
        assert context == print_.model.decoder.max_position or not print_.fits(device, context + 1, 2)


@pytest.mark.parametrize(
    ("precision", "device", "context", "batch", "advice"),
    [
        ("int4", "orin-nx-16", 16_384, 1, ""),
        ("int4", "orin-nx-16", 16_384, 8, "--batch 2"),
        ("int4", "orin-nx-16", 131_072, 1, "--context 33024 --batch 1"),
        ("float16", "l4", 4096, 1, "--precision int8"),
        ("fp8", "a100-40", 4096, 1, "--precision float16"),  # SM80 has no fp8
        ("float16", "h100", 4096, 8, ""),
    ],
)
def test_advice_names_the_knob_and_the_knob_helps(
    precision: str, device: str, context: int, batch: int, advice: str
) -> None:
    print_, chosen = footprint(precision), KNOWN_DEVICES[device]
    assert " ".join(map(remedy_text, print_.advice(chosen, context, batch))) == advice
    words = dict(zip(advice.split()[::2], advice.split()[1::2], strict=True))
    turned = replace(print_, precision=words.get("--precision", precision))
    context, batch = int(words.get("--context", context)), int(words.get("--batch", batch))
    assert turned.supported(chosen) and turned.fits(
        chosen, min(context, 1024) if "--precision" in words else context, batch
    )


def test_float32_is_for_cpus_only() -> None:
    wide = replace(footprint("int4"), dtype="float32")
    assert not wide.supported(KNOWN_DEVICES["h100"])
    assert wide.advice(KNOWN_DEVICES["h100"], 4096, 1) == (Option("dtype", "float16"),)
    assert wide.supported(KnownDevice("cpu", 64_000_000_000, 0, 0))


def test_a_smaller_cache_makes_room_but_not_in_engines() -> None:
    cpu, orin = KnownDevice("cpu", 16_000_000_000, 0, 0), KNOWN_DEVICES["orin-nx-16"]
    coded, floats = footprint("int4", 81_920), footprint("int4")
    assert coded.largest_context(cpu, 1) > 1.5 * floats.largest_context(cpu, 1)
    assert floats.supported(orin) and not coded.supported(orin)
    assert coded.advice(orin, 1024, 1) == ("a cache in float16",)


def test_engines_compute_in_one_memory_as_large_as_their_largest_work_needs() -> None:
    """One picture of the largest side, or a batch of half of it: a quarter of the patches each."""
    orin, l4, print_ = KNOWN_DEVICES["orin-nx-16"], KNOWN_DEVICES["l4"], footprint("int4")
    one, four, eight = (print_.activation_bytes(orin, 4096, batch) for batch in (1, 4, 8))
    assert one == four and eight == 2 * four
    assert print_.activation_bytes(l4, 4096, 8) == print_.activation_bytes(l4, 4096, 1)  # ONNX Runtime's


def test_the_table_names_devices_and_bad_input_says_what_to_type(bundle: Path) -> None:
    done = invoke("plan", bundle, "--device", "l4", "--device", "thor")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["l4", "thor"]
    unknown = invoke("plan", bundle, "--device", "gtx-1080")
    assert unknown.exit_code == 3 and "orin-nx-16|" in unknown.stderr
    other = invoke("plan", bundle, "--precision", "int8")
    assert other.exit_code == 3 and "pixtral plan CHECKPOINT --precision int8" in other.stderr


def cost_words(done: Result) -> dict[str, str]:
    assert done.exit_code == 0, done.stderr
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if len(line.split()) > 1}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--precision", "int4"), "int4"),
        (("--precision", "int4", "--group-size", 128), "int4"),
        (("--precision", "int4", "--method", "awq"), "int4 by AWQ"),
        (("--precision", "int4", "--method", "rtn"), "int4 by rounding"),
        (("--precision", "int8"), "int8"),
        (("--precision", "fp8"), "fp8"),
        (("--kv-cache", "int8"), "float16, int8 KV cache"),
        (("--precision", "int4", "--kv-cache", "int8"), "int4, int8 KV cache"),
    ],
)
def test_a_recipe_comes_with_what_it_cost_where_it_was_measured(options: Sequence[object], name: str) -> None:
    (expected,) = (cost for cost in packaged_costs().recipes if cost.name == name)
    costs = plan(DEMO, *options)["costs"]
    assert costs["recipe"] == name
    assert costs["text"]["perplexity_percent"]["mean"] == expected.text.mean
    assert costs["answers"]["points"]["low"] == expected.answers.low
    assert costs["image_tokens"]["enough"] == expected.enough
    assert costs["measured"]["command"] == packaged_costs().command


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--precision", "nvfp4"), "nvfp4 has no CPU kernels"),
        (("--precision", "int4", "--group-size", 64), "only int8; fp8; int4; "),
        (("--precision", "fp8", "--kv-cache", "int8"), "only int8; fp8; int4; "),
        (("--precision", "int4", "--dtype", "bfloat16"), "float16 activations"),
    ],
)
def test_no_figure_is_given_for_another_recipe(options: Sequence[object], reason: str) -> None:
    assert reason in plan(DEMO, *options)["costs"]["not_measured"]
    words = cost_words(invoke("plan", DEMO, *options))
    assert reason in words["costs"] and "perplexity +" not in str(words)


def test_weights_as_they_are_cost_nothing(bundle: Path) -> None:
    assert plan(DEMO)["costs"] is None and plan(DEMO, "--dtype", "float32")["costs"] is None
    assert plan(bundle)["costs"] is None
    assert not {"text", "answers", "image_tokens", "costs"} & set(cost_words(invoke("plan", DEMO)))


def test_a_bundle_says_what_its_own_recipe_cost(tmp_path: Path) -> None:
    by_rounding = ExportSettings(precision="int4", method="rtn", max_context=512)
    path = exported(DEMO, tmp_path / "b", by_rounding).path
    (expected,) = (cost for cost in packaged_costs().recipes if cost.name == "int4 by rounding")
    words = cost_words(invoke("plan", path))
    assert f"perplexity {expected.text.mean:+.1f} % ({expected.text.low:+.1f} to " in words["text"]
    assert words["answers"].startswith(expected.answers.shown(" points"))
    assert words["image_tokens"].startswith(f"{expected.enough or 'all'} ")
    kept = exported(DEMO, tmp_path / "k", replace(by_rounding, keep=("layers.0.*=float16",))).path
    assert "single layers kept" in plan(kept)["costs"]["not_measured"]
