"""What a recipe cost small trained models, as lines and JSON of `pixtral plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixtral_runtime.bundle.recipe_costs import RecipeKey

OWN = "pixtral eval --task perplexity --against, pixtral tune"


def recipe_costs(key: RecipeKey, dtype: str, keep: Sequence[object] = ()) -> dict[str, Any] | None:
    """The measured figures of a recipe with activations of a dtype, or why there are none; None for no recipe."""
    from dataclasses import asdict

    from pixtral_runtime.bundle.recipe_costs import packaged_costs, why_not_measured

    if key.precision == dtype and key.kv_cache is None and not keep:
        return None
    if reason := why_not_measured(key, dtype, keep):
        return {"not_measured": reason}
    costs = packaged_costs()
    found = costs.find(key)
    assert found is not None
    measured = {"command": costs.command, "date": costs.date, "processor": costs.processor, "samples": "packaged"}
    return {
        "recipe": found.name,
        "text": {
            "perplexity_percent": asdict(found.text),
            "model": costs.text_model,
            "group_size": found.text_groups,
            "windows": costs.windows,
            "tokens": costs.tokens,
        },
        "answers": {
            "points": asdict(found.answers),
            "float16_percent": costs.answer_score,
            "model": costs.answer_model,
            "questions": costs.questions,
        },
        "image_tokens": {
            "budgets": costs.budgets,
            "scores_percent": found.image_scores,
            "enough": found.enough,
            "enough_before": costs.enough,
            "model": costs.answer_model,
            "questions": costs.image_questions,
        },
        "measured": measured,
    }


def cost_lines(costs: dict[str, Any]) -> dict[str, str]:
    """The figures in words, by name."""
    from pixtral_runtime.bundle.recipe_costs import Interval

    if "not_measured" in costs:
        return {"costs": f"not measured: {costs['not_measured']}", "yours": OWN}
    text, answers, images = costs["text"], costs["answers"], costs["image_tokens"]
    percent, points = Interval(**text["perplexity_percent"]), Interval(**answers["points"])
    groups = f" in groups of {text['group_size']}" if text["group_size"] else ""
    enough, before = ("all" if images[name] is None else str(images[name]) for name in ("enough", "enough_before"))
    beside = "as with float16" if enough == before else f"{before} with float16"
    return {
        "text": f"perplexity {percent.shown(' %')}: {text['model']}{groups}, {text['windows']} windows",
        "answers": f"{points.shown(' points')} of {answers['float16_percent']:.0f} %: {answers['model']}, "
        f"{answers['questions']:,} hard questions",
        "image_tokens": f"{enough} are enough, {beside}: {answers['model']}, {images['questions']:,} questions",
        "measured": f"{costs['measured']['date']}, against float16, packaged samples, by scripts/measure_recipes.py; "
        "small models, a large one may lose less",
        "yours": OWN,
    }
