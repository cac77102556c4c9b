"""A benchmark's score as a curve over budgets of image tokens: an evaluation for each, in pairs with the largest one.

Each evaluation is a result of its own. A saved curve names their budgets; the results lie beside it, named after it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.comparison import ScoreComparison, compare_evaluations
from pixtral_runtime.evaluation.result import Evaluation, read_evaluation
from pixtral_runtime.files import write_atomically
from pixtral_runtime.json_data import sealed, typed, unsealed

CURVE_SCHEMA = 1


def budget_name(image_tokens: int | None) -> str:
    """`256`, or `full` for all the tokens that a picture's pixels give."""
    return "full" if image_tokens is None else str(image_tokens)


def tokens_a_picture(records: Iterable[Record]) -> float | None:
    """Mean over the pictures of answered records; None where there is none."""
    answered = [record for record in records if record.error is None]
    pictures = sum(len(record.images) for record in answered)
    return sum(record.image_tokens or 0 for record in answered) / pictures if pictures else None


def result_of_budget(curve: Path, image_tokens: int | None) -> Path:
    """Where the result of a budget lies beside its curve: `float16.256.json` beside `float16.json`."""
    return curve.with_suffix(f".{budget_name(image_tokens)}.json")


@dataclass(frozen=True)
class CurvePoint:
    """The most tokens that a picture took, None for all that its pixels give, and the bundle's answers with them.

    `comparison` is with the point of the most tokens, `against` with another bundle at the same budget; None where
    there is no other, or no example that both scored.
    """

    image_tokens: int | None
    evaluation: Evaluation
    records: Mapping[str, Record]
    comparison: ScoreComparison | None = None
    against: ScoreComparison | None = None

    @property
    def name(self) -> str:
        return budget_name(self.image_tokens)

    @property
    def mean_image_tokens(self) -> float | None:
        """What a picture took, over the pictures of answered examples; None where there is none."""
        return tokens_a_picture(self._answered())

    @property
    def seconds_per_answer(self) -> float | None:
        """Mean of the answers' own times, from reading the picture to the last token, as their records have them.

        Answers that were under way together share the time, so of several slots this is no throughput. Answers that
        were made for another record do not count.
        """
        times = [sum(record.times_ms.values()) / 1000 for record in self._answered() if not record.is_shared]
        return statistics.fmean(times) if times else None

    def _answered(self) -> list[Record]:
        found = (self.records.get(example.id) for example in self.evaluation.examples)
        return [record for record in found if record is not None and record.error is None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_tokens": self.image_tokens,
            "mean_image_tokens": _rounded(self.mean_image_tokens, 1),
            "seconds_per_answer": _rounded(self.seconds_per_answer, 4),
            "summary": self.evaluation.summary(),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "against": None if self.against is None else self.against.to_dict(),
        }


@dataclass(frozen=True)
class Curve:
    """The points of one bundle, fewest tokens first, and the path of the bundle or curve that it is compared with."""

    points: Sequence[CurvePoint]
    against: str | None = None

    @classmethod
    def of(
        cls,
        budgets: Sequence[int | None],
        answered: Sequence[tuple[Evaluation, Mapping[str, Record]]],
        others: Sequence[Evaluation] = (),
        against: str | None = None,
    ) -> Curve:
        """Compare evaluations in the order of their budgets, the most tokens last, and `others` at the same budgets.

        Raises InputError where they are not of the same questions.
        """
        whole = answered[-1][0]
        points = []
        for number, (budget, (evaluation, records)) in enumerate(zip(budgets, answered, strict=True)):
            change = None if evaluation is whole else compared(whole, evaluation)
            beside = compared(others[number], evaluation) if others else None
            points.append(CurvePoint(budget, evaluation, records, change, beside))
        return cls(points, against)

    @property
    def task(self) -> str:
        return self.points[-1].evaluation.task

    @property
    def headline(self) -> str:
        """The metric that scores are by; of the answers that were scored with some budget."""
        return next((point.evaluation.headline for point in reversed(self.points) if point.evaluation.scored), "score")

    @property
    def is_share(self) -> bool:
        """Whether scores are shares of 1, and no ratings."""
        return all(point.evaluation.is_share for point in self.points if point.evaluation.scored)

    @property
    def regressed(self) -> bool:
        """Whether the other bundle is better at some budget. That fewer tokens cost something is no regression."""
        return any(point.against is not None and point.against.regressed for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        points = [point.to_dict() for point in self.points]
        return {"schema": CURVE_SCHEMA, "task": self.task, "against": self.against, "curve": points}

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(sealed(self.to_dict()), indent=1) + "\n").encode())


def compared(old: Evaluation, new: Evaluation) -> ScoreComparison | None:
    """New against old; None where there is no example that both scored. Raises InputError as `compare_evaluations`."""
    known = {example.id for example in old.scored}
    return compare_evaluations(old, new) if any(example.id in known for example in new.scored) else None


def saved_budgets(path: Path) -> list[int | None] | None:
    """The budgets of a saved curve, fewest tokens first; None where the file holds none."""
    try:
        data = unsealed(json.loads(path.read_bytes()))
        if data["schema"] != CURVE_SCHEMA or not data["curve"]:
            return None
        return [typed(int | None, point["image_tokens"], "image_tokens") for point in data["curve"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def saved_results(path: Path, budgets: Sequence[int | None]) -> list[Path]:
    """The files of the results that these budgets are compared with: one result, or those of a saved curve.

    Raises InputError where the file is no such thing, or has not these budgets.
    """
    known = saved_budgets(path)
    if known is None:
        if len(budgets) == 1:
            return [path]
        read_evaluation(path)
        one = Option("against", "BUNDLE", "or a curve that was saved with these budgets")
        raise InputError(f"{path} is the result of one budget of image tokens, and there are {len(budgets)}", one)
    if len(budgets) == 1:
        one = Option("against", str(result_of_budget(path, known[-1])), "for one of them")
        raise InputError(f"{path} is a curve over {len(known)} budgets of image tokens", one)
    if missing := [budget_name(budget) for budget in budgets if budget not in known]:
        named = Option("image_tokens", ",".join(map(budget_name, known)))
        raise InputError(f"the curve {path} has no result with {', '.join(missing)} image tokens", named)
    return [result_of_budget(path, budget) for budget in budgets]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
