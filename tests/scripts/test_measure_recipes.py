"""What recipes cost: the packaged figures, the documents' table of them, and how they are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from check_tune import ALL_BUDGETS
from demo_bundles import easy_vqa_questions
from helpers.bundles import export_tiny
from helpers.places import DEMO, ROOT
from measure_recipes import MEASURED, change, enough, evaluated, markdown
from pixtral_export.quantization.recipes import RECIPES
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.recipe_costs import Interval, RecipeKey, bundle_key, packaged_costs
from pixtral_runtime.evaluation.result import Evaluation, Scored

PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")


def test_the_documents_say_what_the_package_holds() -> None:
    costs = packaged_costs()
    assert markdown(costs) in PAGE
    assert costs.command in PAGE.replace("\n", " ")
    assert f"{costs.windows} windows" in PAGE and f"{costs.questions:,} questions" in PAGE


def test_every_recipe_and_method_that_a_cpu_runs_was_measured() -> None:
    costs = packaged_costs()
    assert tuple(cost.name for cost in costs.recipes) == MEASURED
    keys = {(cost.key.precision, cost.key.method) for cost in costs.recipes if cost.key.kv_cache is None}
    assert keys == {("int8", "smoothquant"), ("fp8", "gptq"), *(("int4", method) for method in RECIPES["int4"].methods)}
    assert costs.find(RecipeKey("int4", "gptq", 128, None)) is not None
    assert costs.find(RecipeKey("int4", "gptq", 64, None)) is None
    for cost in costs.recipes:
        assert cost.text.low <= cost.text.mean <= cost.text.high
        assert cost.answers.low <= cost.answers.mean <= cost.answers.high
        assert enough(cost.image_scores) == cost.enough and len(cost.image_scores) == len(costs.budgets)


def test_enough_is_the_fewest_tokens_within_two_points_of_all() -> None:
    assert len(ALL_BUDGETS) == 5
    assert enough([70.0, 85.0, 97.9, 98.0, 100.0]) == 128
    assert enough([70.0, 85.0, 90.0, 97.9, 100.0]) is None
    assert enough([98.0, 98.0, 98.0, 98.0, 98.0]) == 16


def evaluation(task: str, metric: str, values: list[float]) -> Evaluation:
    examples = [Scored(str(n), "?", (), scores={metric: value}) for n, value in enumerate(values)]
    return Evaluation(task, {}, examples)


def test_a_change_is_in_percent_of_perplexity_or_in_points() -> None:
    nats = [evaluation("perplexity", "nats_per_token", values) for values in ([2.0, 3.0], [2.1, 3.1])]
    assert change(*nats).mean == 10.52  # e ** 0.1
    found = change(*(evaluation("easy_vqa", "exact", values) for values in ([1.0] * 4, [1.0, 1.0, 1.0, 0.0])))
    assert found.mean == -25 and found.low <= -50 and found.high == 0


def test_a_change_is_shown_with_its_sign_and_nothing_without() -> None:
    assert Interval(7.24, 6.1, 8.38).shown(" %") == "+7.2 % (+6.1 to +8.4)"
    assert Interval(-0.04, -0.26, 0.04).shown() == "0.0 (-0.3 to 0.0)"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(export_tiny(DEMO, tmp_path_factory.mktemp("recipes") / "b"))


def test_what_was_evaluated_is_kept_for_the_same_bundle_only(bundle: Bundle, tmp_path: Path) -> None:
    asked = easy_vqa_questions(3)
    first = evaluated(bundle, asked, tmp_path, "few", 16)
    assert first.setting["image_tokens"] == 16 and len(first.scored) == 3
    (kept,) = tmp_path.iterdir()
    shorter = replace(first, examples=first.examples[:1])
    shorter.save(kept)
    assert len(evaluated(bundle, asked, tmp_path, "few", 16).scored) == 1
    replace(shorter, setting={**first.setting, "fingerprint": "of another"}).save(kept)
    assert len(evaluated(bundle, asked, tmp_path, "few", 16).scored) == 3


def test_a_bundle_names_its_recipe(bundle: Bundle) -> None:
    assert bundle_key(bundle.precision, bundle.kv_cache, bundle.quantization) == RecipeKey("float16", "rtn", None, None)
