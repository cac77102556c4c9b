"""Two evaluations of one task: the paired difference, the examples that flipped, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.metrics import LOSSES
from pixtral_runtime.evaluation.result import NATS_METRIC, RATING_METRIC, Evaluation, Scored
from pixtral_runtime.evaluation.score import (
    PERPLEXITY_PERCENT,
    Paired,
    paired,
    perplexity_verdict,
    verdict,
    wording_points,
)


@dataclass(frozen=True)
class Flip:
    """An example whose headline score changed."""

    id: str
    question: str
    references: tuple[str, ...]
    old_answer: str
    new_answer: str
    old_score: float
    new_score: float


@dataclass(frozen=True)
class ScoreComparison:
    """New against old. `unpaired` counts examples that only one of them scored.

    `regressed`: worse, not by luck, and by more than the wording of a prompt may do.
    """

    changes: dict[str, Paired]  # by metric, the headline first
    flips: Sequence[Flip]
    unpaired: int
    verdict: str
    regressed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_evaluations(old: Evaluation, new: Evaluation) -> ScoreComparison:
    """Pair the examples of two evaluations by id. Raises InputError where they are not of the same questions."""
    hint = "evaluate both bundles on the same task, data and limit"
    if old.task != new.task:
        raise InputError(f"one is an evaluation of {old.task}, the other of {new.task}", hint)
    before = {example.id: example for example in old.scored}
    pairs = [(before[example.id], example) for example in new.scored if example.id in before]
    for one, other in pairs:
        if (one.question, one.references) != (other.question, other.references):
            raise InputError(f"{one.id} is another question, or has other references, in the two evaluations", hint)
    if not pairs:
        raise InputError("the two evaluations have no scored example in common", hint)
    changes = {new.headline: paired([a.score or 0.0 for a, _ in pairs], [b.score or 0.0 for _, b in pairs])}
    for name in new.scores:
        if all(name in example.scores for pair in pairs for example in pair):
            changes[name] = _change(name, pairs)
    headline = changes[new.headline]
    words, allowed, loss = _rated(headline), 0.0, -headline.difference
    if new.headline == NATS_METRIC:
        words, allowed, loss = perplexity_verdict(headline), math.log1p(PERPLEXITY_PERCENT / 100), headline.difference
    elif new.headline != RATING_METRIC:
        words, allowed = verdict(new.task, headline), wording_points(new.task) / 100
    if headline.n == 1:
        words = "one example tells nothing of a difference: evaluate more"
    regressed = headline.significant and loss > allowed
    unpaired = len(before) + len(new.scored) - 2 * len(pairs)
    return ScoreComparison(changes, [_flip(a, b) for a, b in pairs if a.score != b.score], unpaired, words, regressed)


def _change(name: str, pairs: Sequence[tuple[Scored, Scored]]) -> Paired:
    """Of one metric. The weights are the same in both, as they are the question's."""
    weights = [new.weights.get(name, 1.0) for _, new in pairs]
    old, new = ([example.scores[name] for example in side] for side in zip(*pairs, strict=True))
    return paired(old, new, weights, less_is_better=name in LOSSES)


def _flip(old: Scored, new: Scored) -> Flip:
    answers, scores = (old.answer or "", new.answer or ""), (old.score or 0.0, new.score or 0.0)
    return Flip(new.id, new.question, new.references, *answers, *scores)


def _rated(change: Paired) -> str:
    """Ratings run from 1 to 10, and what wording does to them is not known."""
    if not change.significant:
        most = max(abs(change.low), abs(change.high))
        return f"no difference can be shown (p = {change.p_value:.2g}); at most {most:.2f} of 10"
    word = "better" if change.difference > 0 else "worse"
    return f"{word} by {abs(change.difference):.2f} of 10 (p = {change.p_value:.2g})"
