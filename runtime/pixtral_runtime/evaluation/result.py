"""An evaluation's result: every example with its answer and scores, the means with intervals, and what is missing.

Broken rows, images that could not be read and turns that no judge rated have no score. They are listed with the reason,
and the number that a mean is over is always beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.judge import rating_averages
from pixtral_runtime.evaluation.metrics import LOSSES, METRICS, WEIGHTS
from pixtral_runtime.evaluation.score import Score
from pixtral_runtime.evaluation.task import BrokenRow, Example, Task
from pixtral_runtime.files import write_atomically
from pixtral_runtime.json_data import from_json, sealed, unsealed

RESULT_SCHEMA = 1
RATING_METRIC = "rating"
NATS_METRIC, PERPLEXITY = "nats_per_token", "perplexity"
MEAN_OF_GROUPS = frozenset({"mmlu"})  # tasks whose groups count alike in a second average


@dataclass(frozen=True)
class Scored:
    """An example, what was answered, and its score by each metric, the headline first; none where `error` says why.

    `weights` say how much it counts, by metric, where that is not 1.
    """

    id: str
    question: str
    references: tuple[str, ...]
    group: str = ""
    answer: str | None = None
    finish_reason: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    turn: int | None = None  # of a conversation, from 1
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """By the headline metric."""
        return next(iter(self.scores.values()), None)


@dataclass(frozen=True)
class Evaluation:
    """A task's result for one bundle. `setting` says what was run and how, `rows` counts what the dataset had."""

    task: str
    setting: Mapping[str, Any]
    examples: Sequence[Scored]
    broken_rows: Sequence[BrokenRow] = ()

    @property
    def rows(self) -> int:
        """Examples that the data had or should have had: what a perfect run would score."""
        return len(self.examples) + len(self.broken_rows)

    @property
    def scored(self) -> list[Scored]:
        return [example for example in self.examples if example.scores]

    @property
    def headline(self) -> str:
        """The metric that `score` is by; several where examples bring their own."""
        return " and ".join(dict.fromkeys(next(iter(example.scores)) for example in self.scored))

    @property
    def is_share(self) -> bool:
        """Whether scores are shares of 1, and neither ratings nor nats."""
        return self.headline != RATING_METRIC and self.headline not in LOSSES

    @property
    def scores(self) -> dict[str, Score]:
        """By metric, each over the examples that have it."""
        names = dict.fromkeys(name for example in self.scored for name in example.scores)
        found = {name: _score(name, [each for each in self.scored if name in each.scores]) for name in names}
        return found | ({PERPLEXITY: found[NATS_METRIC].exponential()} if NATS_METRIC in found else {})

    @property
    def headline_score(self) -> Score | None:
        """Over all examples, each by its headline metric; None where none was scored."""
        return _score("", self.scored) if self.scored else None

    @property
    def groups(self) -> dict[str, Score]:
        """The headline score of each group, where there are several."""
        members: dict[str, list[Scored]] = {}
        for example in self.scored:
            members.setdefault(example.group, []).append(example)
        if len(members) < 2:
            return {}
        return {name: _score("", members[name]) for name in sorted(members)}

    @property
    def averages(self) -> dict[str, float]:
        """Of a judge's ratings, the means that `judge.rating_averages` names; of MMLU, that over its subjects."""
        if self.task in MEAN_OF_GROUPS and (groups := self.groups):
            return {"mean of groups": statistics.fmean(score.mean for score in groups.values())}
        rated = [
            (each.scores[RATING_METRIC], each.group, each.turn or 1)
            for each in self.scored
            if RATING_METRIC in each.scores
        ]
        return rating_averages(rated) if rated else {}

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What has no score: id and reason."""
        rows = [(row.id, row.reason) for row in self.broken_rows]
        return rows + [(example.id, example.error or "not scored") for example in self.examples if not example.scores]

    def summary(self) -> dict[str, Any]:
        """All but the examples."""
        return {
            "task": self.task,
            "headline": self.headline,
            "scored": len(self.scored),
            "rows": self.rows,
            "cut_off": sum(example.finish_reason == "length" for example in self.examples),
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "groups": {name: asdict(score) for name, score in self.groups.items()},
            "averages": self.averages,
            "missing": [{"id": name, "reason": reason} for name, reason in self.missing],
            "setting": dict(self.setting),
        }

    def to_dict(self) -> dict[str, Any]:
        examples = [asdict(example) for example in self.examples]
        broken = [asdict(row) for row in self.broken_rows]
        return {"schema": RESULT_SCHEMA} | self.summary() | {"examples": examples, "broken_rows": broken}

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(sealed(self.to_dict()), indent=1) + "\n").encode())


def read_evaluation(path: Path) -> Evaluation:
    """A result that `save` wrote. Raises InputError."""
    hint = "name a file that 'pixtral eval --save' wrote, or a bundle"
    try:
        data = unsealed(json.loads(path.read_bytes()))
        if data["schema"] != RESULT_SCHEMA:
            raise InputError(f"{path}: schema {data['schema']}, this pixtral reads {RESULT_SCHEMA}", "evaluate it anew")
        return from_json(Evaluation, {field.name: data[field.name] for field in fields(Evaluation)})
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no result of an evaluation: {error}", hint) from error


def requests_of(examples: Iterable[Example], max_new_tokens: int) -> list[Request]:
    """What the batch runtime is asked, an example each."""
    return [Request(example.id, example.messages, max_new_tokens) for example in examples]


def score_answers(task: Task, examples: Iterable[Example], records: Mapping[str, Record]) -> list[Scored]:
    """Every example with its answer's scores by the task's metrics, or by its own."""
    result = []
    for example in examples:
        scored = _answered(example, records.get(example.id))
        if scored.error is None:
            names = task.metrics if example.metric is None else (example.metric,)
            said = scored.answer or ""
            scored = _with_scores(scored, {name: METRICS[name](said, example) for name in names})
            weights = {name: WEIGHTS[name](said, example) for name in names if name in WEIGHTS}
            scored = replace(scored, weights=weights)
        result.append(scored)
    return result


def score_ratings(
    examples: Iterable[Example], records: Mapping[str, Record], ratings: Mapping[str, tuple[float | None, str | None]]
) -> list[Scored]:
    """Every example with its judge's rating; `ratings` are a number, or None and the reason, by example."""
    result = []
    for example in examples:
        scored = _answered(example, records.get(example.id))
        if scored.error is None:
            rating, reason = ratings.get(example.id, (None, None))
            scored = (
                _with_scores(scored, {RATING_METRIC: rating})
                if rating is not None
                else Scored(**vars(scored) | {"error": f"not rated: {reason or 'the judge was not asked'}"})
            )
        result.append(scored)
    return result


def _score(name: str, examples: Sequence[Scored]) -> Score:
    """By a metric, or by each one's headline where it has no name."""
    names = [name or next(iter(example.scores)) for example in examples]
    values = [example.scores[one] for one, example in zip(names, examples, strict=True)]
    return Score.of(values, [example.weights.get(one, 1.0) for one, example in zip(names, examples, strict=True)])


def _answered(example: Example, record: Record | None) -> Scored:
    error = "not answered" if record is None else record.error
    answer, reason = (None, None) if record is None else (record.answer, record.finish_reason)
    return Scored(
        example.id,
        example.question,
        example.references,
        example.group,
        answer,
        reason,
        error=error,
        turn=example.details.get("turn"),
    )


def _with_scores(scored: Scored, scores: Mapping[str, float]) -> Scored:
    return Scored(**vars(scored) | {"scores": dict(scores)})
