"""`pixtral compare`: bundles that are the same, close, damaged in one known place, or not comparable at all."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.places import DATA
from helpers.tiny import edit_weights, tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_runtime import load
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.compare import compare as module
from pixtral_runtime.compare.compare import DEFAULT_PROMPT, CompareSettings, compare_bundles, read_prompts
from pixtral_runtime.compare.divergence import Noise, first_difference, kl_nats, top2_gap_nats
from pixtral_runtime.compare.page import compare_page
from pixtral_runtime.compare.result import BundleComparison, Skipped
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import open_image

CHECKPOINT = DATA / "tiny-pixtral"
IMAGES = DATA / "images"
DAMAGED_LAYER = 1  # of 0 to 2
KL_MEAN_NATS = 1e-3  # float16 against float32, mean over tokens; seen 5e-10


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def exact(folder: Path) -> Path:
    return export_tiny(CHECKPOINT, folder / "float32", dtype="float32")


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    return export_tiny(CHECKPOINT, folder / "float16", dtype="float16")


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Path:
    """One layer's value projection with noise of a third of its own size."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weight = weights[f"layers.{DAMAGED_LAYER}.attention.wv.weight"]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight += (0.3 * weight.float().std() * noise).to(weight.dtype)

    checkpoint = copytree(CHECKPOINT, folder / "checkpoint")
    edit_weights(checkpoint / "consolidated.safetensors", change)
    return export_tiny(checkpoint, folder / "damaged", dtype="float32")


@pytest.fixture(scope="module")
def sound(folder: Path) -> Path:
    """Random weights: the first choice leads by little, so that a small change flips some."""
    return export_tiny(write_checkpoint(folder / "sound-checkpoint", tiny_config()), folder / "sound", dtype="float32")


@pytest.fixture(scope="module")
def shaken(folder: Path) -> Path:
    """`sound` with every weight changed by some percent."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for weight in weights.values():
            weight *= 1 + 0.03 * torch.randn(weight.shape, generator=generator).to(weight.dtype)

    checkpoint = write_checkpoint(folder / "shaken-checkpoint", tiny_config())
    edit_weights(checkpoint / "consolidated.safetensors", change)
    return export_tiny(checkpoint, folder / "shaken", dtype="float32")


def compared(a: Path, b: Path, texts: tuple[str, ...] = (DEFAULT_PROMPT,), **settings: Any) -> BundleComparison:
    paths = sorted(IMAGES.glob("*.png"))[:3]
    stages: list[tuple[str, int, int]] = []
    report = compare_bundles(
        open_bundle(a), open_bundle(b), paths, texts, CompareSettings(**settings), lambda *stage: stages.append(stage)
    )
    total = len(paths) * len(texts)
    assert [stages[0], stages[-1]] == [("reference", 0, total), ("candidate", total, total)]
    return report


def test_a_bundle_equals_itself(exact: Path) -> None:
    report = compared(exact, exact)
    assert report.logits.positions > 10
    assert report.logits.kl_max_nats < 1e-9
    assert (report.logits.top1_agreement, report.logits.disagreements) == (1.0, 0)
    assert report.image_features_db is None and report.worst_layer is None
    assert [(n.key_db, n.value_db) for n in report.layers] == [(None, None)] * 3
    assert report.answers is not None
    assert (report.answers.exact_match, report.answers.similarity_mean) == (1.0, 1.0)
    assert all(case.first_diverging_token is case.first_different_token is None for case in report.cases)
    assert report.cases[0].reference_answer == "A black rectangle on a light background."


def test_float16_is_close_to_float32_and_not_the_same(exact: Path, half: Path) -> None:
    report = compared(exact, half)
    assert report.logits.kl_max_nats > 0
    assert report.logits.kl_mean_nats < KL_MEAN_NATS
    assert report.logits.top1_agreement > 0.99
    assert (report.reference.dtype, report.candidate.dtype) == ("float32", "float16")
    assert report.candidate.bundle_bytes < report.reference.bundle_bytes
    snr = [db for layer in report.layers for db in (layer.key_db, layer.value_db)] + [report.image_features_db]
    assert all(db is not None and 55 < db < 85 for db in snr)  # float16 rounds to 11 bits; seen 67 to 71


def test_the_damaged_layer_is_named(exact: Path, damaged: Path) -> None:
    report = compared(exact, damaged)
    assert report.worst_layer is not None
    assert (report.worst_layer.layer, report.worst_layer.tensor) == (DAMAGED_LAYER, "value")
    assert 10 < report.worst_layer.snr_db < 20  # 10.5 dB for inputs of no preferred direction; seen 15.8
    assert report.image_features_db is None  # the damage is behind the vision encoder
    before = [(n.key_db, n.value_db) for n in report.layers[:DAMAGED_LAYER]]
    assert before == [(None, None)] * DAMAGED_LAYER and report.layers[DAMAGED_LAYER].key_db is None
    assert report.layers[DAMAGED_LAYER + 1].key_db is not None  # and what comes after it reads noise
    assert report.logits.kl_max_nats > 1e-6


def test_both_bundles_read_the_references_answer(exact: Path, damaged: Path) -> None:
    """The forced pass is the reference's text, so a case has as many positions as the reference's answer."""
    report = compared(exact, damaged, max_new_tokens=4)
    model = load(exact)
    answers = [model.generate(DEFAULT_PROMPT, [c.image or ""], max_new_tokens=4) for c in report.cases]
    assert [c.positions for c in report.cases] == [len(answer.token_ids) for answer in answers]
    assert [c.reference_answer for c in report.cases] == [answer.text for answer in answers]


def test_a_free_answer_parts_where_the_first_choices_do(sound: Path, shaken: Path) -> None:
    """Until they part both answers are one text, so the forced and the free pass must name the same token."""

    report = compared(sound, shaken, ("What?", "How many are there?", "Why?"))
    first = [case.first_diverging_token for case in report.cases]
    assert first == [case.first_different_token for case in report.cases]
    assert any(first)  # some part, and not all of them at once
    parted = [case for case in report.cases if case.first_diverging_token is not None]
    assert all(case.top1_agreement < 1 and case.answer != case.reference_answer for case in parted)
    assert report.answers is not None and report.answers.exact_match == 1 - len(parted) / len(report.cases)
    expected = sum((1 - case.top1_agreement) * case.positions for case in report.cases)
    assert report.logits.disagreements == pytest.approx(expected)
    assert 0 < report.answers.similarity_mean < 1


def test_forced_logits_are_those_of_a_full_pass(exact: Path) -> None:
    model = load(exact)
    prompt = model.prompts.build(user_message("What?", [open_image(IMAGES / "blue_circle_64x64.png")]))
    forced, length = [300, 40, 77, 2], len(prompt.token_ids)
    run = module._forced_pass(model, prompt, forced)
    longer = replace(
        prompt,
        token_ids=np.append(prompt.token_ids, forced[:-1]),
        feature_index=np.append(prompt.feature_index, [-1, -1, -1]),
    )
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    whole = model.runner.prefill(longer, run.features, cache, all_logits=True)
    np.testing.assert_allclose(run.logits, whole[length - 1 :], atol=1e-4)  # seen 1e-5
    for (key, value), (whole_key, whole_value) in zip(run.layers, cache.layers(), strict=True):
        assert key.shape[1] == length + 3
        np.testing.assert_allclose(key, whole_key[0][:, : length + 3], atol=1e-4)
        np.testing.assert_allclose(value, whole_value[0][:, : length + 3], atol=1e-4)


def test_kl_and_gap_are_those_of_the_formula() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.25, 0.25, 0.5])
    expected = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    assert kl_nats(np.log(p) + 3, np.log(q) - 50) == pytest.approx(expected, rel=1e-12)  # shifts do not count
    assert kl_nats(np.log(q), np.log(p)) != pytest.approx(expected, rel=1e-3)  # the order does
    assert kl_nats(np.array([1e4, 0], np.float32), np.array([0, 0], np.float32)) == pytest.approx(math.log(2))
    assert top2_gap_nats(np.log(p)) == pytest.approx(math.log(3.5))


def test_noise_is_summed_before_the_ratio() -> None:
    noise = Noise()
    noise.add(np.array([3.0, 4.0], np.float16), np.array([3.0, 4.0], np.float32))
    assert noise.snr_db is None
    noise.add(np.array([0.0, 5.0], np.float32), np.array([0.5, 5.0], np.float16))
    assert noise.snr_db == pytest.approx(10 * math.log10(50 / 0.25))


@pytest.mark.parametrize(("gap", "near_ties"), [(0.05, 1), (0.2, 0)])
def test_a_flipped_near_tie_is_counted_apart(gap: float, near_ties: int) -> None:
    totals = module._Totals(kl_nats=[0.1, 0.0, 0.0, 0.3], gaps_nats=[gap])
    summary = module._summarize(totals)
    assert (summary.positions, summary.disagreements, summary.near_ties) == (4, 1, near_ties)
    assert (summary.top1_agreement, summary.kl_max_nats) == (0.75, 0.3)
    assert [summary.kl_mean_nats, summary.kl_median_nats] == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(
    ("ours", "theirs", "first"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([1], [2], 0)]
)
def test_the_first_difference_of_two_answers(ours: list[int], theirs: list[int], first: int | None) -> None:
    assert first_difference(ours, theirs) == first


def test_a_file_of_prompts_may_have_comments(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\nWhat is it?\n\n  Which colour?  \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["What is it?", "Which colour?"]
    (tmp_path / "prompts.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "prompts.txt")


def test_json_is_one_document_with_logits_before_texts(exact: Path, half: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("what shape is shown?\nwhat color is the shape?\n", encoding="utf-8")
    arguments = ("--images", IMAGES, "--prompts", tmp_path / "prompts.txt", "--limit", 2, "--max-new-tokens", 3)
    done = invoke("compare", exact, half, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert next(iter(document)) == "logits" and list(document).index("answers") > list(document).index("layers")
    assert [(Path(c["image"]).name, c["prompt"]) for c in document["cases"]] == [
        (path.name, prompt)
        for path in sorted(IMAGES.glob("*.png"))[:2]
        for prompt in ("what shape is shown?", "what color is the shape?")
    ]
    assert document["logits"]["positions"] == sum(case["positions"] for case in document["cases"])
    assert document["settings"]["max_new_tokens"] == 3


def test_the_tables_show_logits_before_texts(exact: Path) -> None:
    done = invoke("compare", exact, exact, "--images", IMAGES, "--limit", 1)
    assert done.exit_code == 0, done.stderr
    words = ("kl_mean_nats", "top1_agreement", "same_answer", "noisiest first", "first diverging", "fingerprint")
    places = [done.stdout.index(word) for word in words]
    assert places == sorted(places)
    assert "exact" in done.stdout


def test_prompts_alone_can_be_compared(exact: Path) -> None:
    done = invoke("compare", exact, exact, "--json", "--max-new-tokens", 2)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["images"], document["cases"][0]["image"]) == (0, None)
    assert "--images" in done.stderr


def test_a_broken_image_is_listed_and_the_rest_compared(exact: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((IMAGES / "blue_circle_64x64.png").read_bytes()[:60])
    both = ("--images", tmp_path, "--images", IMAGES / "red_triangle_64x64.png")
    done = invoke("compare", exact, exact, *both, "--json", "--max-new-tokens", 2)
    assert done.exit_code == 5
    document = json.loads(done.stdout)
    assert [Path(skipped["image"]).name for skipped in document["skipped"]] == ["broken.png"]
    assert [Path(case["image"]).name for case in document["cases"]] == ["red_triangle_64x64.png"]
    assert "broken.png" in done.stderr
    alone = invoke("compare", exact, exact, "--images", tmp_path)
    assert (alone.exit_code, alone.stdout) == (3, "")
    assert "nothing is left" in alone.stderr and "hint: " in alone.stderr


def test_different_models_and_tokenizers_are_refused(exact: Path, sound: Path) -> None:
    done = invoke("compare", exact, sound)
    assert done.exit_code == 3
    assert "vision.hidden_size is 128 and 64" in done.stderr and "hint: " in done.stderr
    bundle = open_bundle(exact)
    entry = replace(bundle.files["tekken.json"], sha256="0" * 64)
    with pytest.raises(InputError, match="tokenizers"):
        module.check_comparable(bundle, replace(bundle, files=bundle.files | {"tekken.json": entry}))


def test_the_page_is_self_contained_and_escaped(exact: Path, damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('<b>what</b> & "how"?\n', encoding="utf-8")
    target = tmp_path / "new" / "page.html"
    arguments = ("--images", IMAGES, "--limit", 2, "--prompts", tmp_path / "prompts.txt", "--html", target)
    done = invoke("compare", exact, damaged, *arguments, "--max-new-tokens", 2)
    assert done.exit_code == 0, done.stderr
    text = target.read_text(encoding="utf-8")
    assert "&lt;b&gt;what&lt;/b&gt; &amp; &quot;how&quot;?" in text
    assert not [word for word in ("<b>", "http:", "https:", "<script", "<link", "nan") if word in text]
    assert text.count("<rect") == 2 + 2 * 3  # a bar a case, and a key and a value a layer
    assert text.index("Logits</h2>") < text.index("Answers</h2>")
    again = invoke("compare", exact, damaged, *arguments)
    assert (again.exit_code, target.read_text(encoding="utf-8")) == (3, text)
    assert "--force" in again.stderr


def test_skipped_images_are_on_the_page(exact: Path) -> None:
    report = compared(exact, exact, max_new_tokens=1)
    skipped = Skipped("<broken>.png", None, "cut & gone", "copy it")
    text = compare_page(replace(report, skipped=(skipped,)))
    assert "&lt;broken&gt;.png" in text and "cut &amp; gone" in text


def test_the_temporary_folder_is_removed_after_an_error(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        assert list(tmp_path.glob("pixtral-compare-*/0.npz"))
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_compare_case", fail)
    with pytest.raises(KeyboardInterrupt):
        compared(exact, exact, max_new_tokens=1)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_numbers_are_refused(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.full((1, 8), np.nan, np.float32)
    monkeypatch.setattr("pixtral_runtime.generation.model_runner.ModelRunner.prefill", lambda *_, **__: rows)
    with pytest.raises(InputError, match="not numbers"):
        compared(exact, exact, max_new_tokens=1)
