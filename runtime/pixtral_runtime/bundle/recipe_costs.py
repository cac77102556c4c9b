"""What each recipe cost two small trained models: measured figures, for people who choose between recipes.

`scripts/measure_recipes.py` writes `recipe_costs.json`. All figures are changes from float16 weights and cache, with
the packaged calibration samples and float16 activations. They say how recipes compare, not what a larger model loses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pixtral_runtime.json_data import from_json

ACTIVATIONS = "float16"
NO_CPU_KERNELS = "nvfp4"


@dataclass(frozen=True)
class Interval:
    """A change between the bounds that hold it at 95 %."""

    mean: float
    low: float
    high: float

    def shown(self, unit: str = "") -> str:
        """As in "+7.2 % (+6.1 to +8.4)"."""
        mean, low, high = map(_signed, (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})"


@dataclass(frozen=True)
class RecipeKey:
    """What makes a recipe another one. `group_size` is None where there is one scale an output."""

    precision: str
    method: str
    group_size: int | None
    kv_cache: str | None


@dataclass(frozen=True)
class RecipeCost:
    """A recipe's figures. `name` is that of the tables.

    Text is in percent of perplexity, where layers that the group size does not divide have groups of `text_groups`.
    Answers are in points of accuracy; `image_scores` are accuracies in percent with each of the budgets, of which
    `enough` is the first that is close to all tokens; None for all.
    """

    name: str
    key: RecipeKey
    text: Interval
    text_groups: int | None
    answers: Interval
    image_scores: list[float]
    enough: int | None


@dataclass(frozen=True)
class RecipeCosts:
    """All recipes that were measured, and how. Scores are in percent; a budget of None is all of a picture's tokens."""

    command: str
    date: str
    processor: str
    text_model: str
    windows: int
    tokens: int
    perplexity: float  # with float16 weights, as all that follows
    answer_model: str
    questions: int
    answer_tokens: int  # an image
    answer_score: float
    image_questions: int
    tolerance_points: float
    budgets: list[int | None]
    image_scores: list[float]
    enough: int | None
    recipes: list[RecipeCost]

    def find(self, key: RecipeKey) -> RecipeCost | None:
        return next((cost for cost in self.recipes if cost.key == key), None)


@cache
def packaged_costs() -> RecipeCosts:
    """The figures that come with this package."""
    return from_json(
        RecipeCosts, json.loads(files("pixtral_runtime").joinpath("bundle/recipe_costs.json").read_bytes())
    )


def bundle_key(precision: str, kv_cache: str | None, quantization: dict[str, Any]) -> RecipeKey:
    """A bundle's recipe, by what its manifest says."""
    method, group_size = quantization.get("method", "rtn"), quantization.get("group_size")
    return RecipeKey(precision, str(method), group_size if isinstance(group_size, int) else None, kv_cache)


def why_not_measured(key: RecipeKey, dtype: str, keep: Iterable[object]) -> str | None:
    """Why there are no figures of a recipe with activations of a dtype; None where there are."""
    if key.precision == NO_CPU_KERNELS:
        return f"{NO_CPU_KERNELS} has no CPU kernels"
    if dtype != ACTIVATIONS:
        return f"measured with {ACTIVATIONS} activations only"
    if any(True for _ in keep):
        return "not with single layers kept otherwise"
    if packaged_costs().find(key) is not None:
        return None
    return f"only {'; '.join(cost.name for cost in packaged_costs().recipes)} were"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return text if float(text) else "0.0"
