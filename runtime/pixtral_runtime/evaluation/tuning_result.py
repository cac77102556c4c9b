"""What tuning found, as data: a row for each setting, what is recommended, and the answers that changed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Record
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tuning import Standing, Tuned
from pixtral_runtime.evaluation.tuning_divergence import DIVERGENCE
from pixtral_runtime.evaluation.tuning_run import Trial
from pixtral_runtime.files import write_atomically

TUNE_SCHEMA = 1


@dataclass(frozen=True)
class Change:
    """An example whose score differs between two settings."""

    example: Example
    old: Record
    new: Record
    old_score: float
    new_score: float


@dataclass(frozen=True)
class TuneResult:
    """The settings of a trial with their standings. `costs` says where the seconds are from.

    `command` is what the user may type to run the recommended setting; None where there is none.
    """

    trial: Trial
    tuned: Tuned
    tolerance: float
    costs: str
    command: str | None = None

    @property
    def verdict(self) -> str:
        """For people."""
        tuned, points = self.tuned, f"{100 * self.tolerance:g} points"
        if not any(standing.score.n for standing in tuned.standings):
            return "nothing can be told: no example was answered"
        if tuned.recommended is not None:
            chosen, best = tuned.standings[tuned.recommended], tuned.standings[tuned.best]
            name = self.name(tuned.recommended)
            if tuned.recommended == tuned.best:
                is_cheapest = all(chosen.cost <= standing.cost for standing in tuned.standings)
                cheaper = "was tried" if is_cheapest else f"is known to be at most {points} below"
                return f"{name} score best, and nothing cheaper {cheaper}"
            saved = f", at {chosen.cost / best.cost:.0%} of its cost" if best.cost else ""
            return f"{name} are enough: at most {points} below the best{saved}"
        if tuned.more is None:
            return f"the examples cannot tell which setting is at most {points} below the best; a larger tolerance may"
        return (
            f"not enough examples to tell within {points}: at least {tuned.more} more are needed, or a larger tolerance"
        )

    def name(self, number: int) -> str:
        """A setting for people; the bundle where there are several."""
        setting = self.trial.settings[number]
        words = f"{setting.tokens} image tokens"
        return words if len(self.trial.bundles) == 1 else f"{setting.bundle} with {words}"

    def changes(self, old: int, new: int) -> list[Change]:
        """Examples that both settings answered, with another score; losses first.

        Where logits are compared every score is another one: those with another answer.
        """
        trial, found = self.trial, []
        for example in trial.questions.examples:
            if example.id in trial.replies[old] and example.id in trial.replies[new]:
                scores = trial.score(old, example), trial.score(new, example)
                records = trial.replies[old][example.id], trial.replies[new][example.id]
                is_same = example.metric == DIVERGENCE and records[0].answer == records[1].answer
                if abs(scores[0] - scores[1]) > 1e-9 and not is_same:  # False for NaN
                    found.append(Change(example, *records, *scores))
        return sorted(found, key=lambda change: change.new_score - change.old_score)

    def to_dict(self) -> dict[str, Any]:
        tuned, trial = self.tuned, self.trial
        return {
            "schema": TUNE_SCHEMA,
            "verdict": self.verdict,
            "command": self.command,
            "recommended": tuned.recommended,
            "best": tuned.best,
            "more_examples": tuned.more,
            "tolerance": self.tolerance,
            "metric": self.trial.questions.metric,
            "judged_by": "answers" if trial.reference is None else self.name(trial.reference),
            "costs": self.costs,
            "examples": len(trial.questions.examples),
            "unanswered": trial.unanswered,
            "broken_rows": [asdict(row) for row in trial.questions.broken],
            "requests": sum(standing.asked for standing in tuned.standings),
            "share_of_full_cost": round(tuned.spent / tuned.full, 4) if tuned.full else None,
            "settings": [self._row(number, standing) for number, standing in enumerate(tuned.standings)],
        }

    def _row(self, number: int, standing: Standing) -> dict[str, Any]:
        setting = self.trial.settings[number]
        return {
            "bundle": str(setting.bundle),
            "precision": self.trial.bundles[setting.bundle].precision,
            "image_tokens": setting.image_tokens,
            "mean_image_tokens": round(self.trial.image_tokens(number), 1),
            "state": standing.state,
            "score": asdict(standing.score),
            "difference": asdict(standing.difference),
            "batch": self.trial.batch(number),
            "seconds": standing.cost,
            "seconds_by_batch": self.trial.costs(number),
            "asked": standing.asked,
            "on_front": standing.on_front,
        }

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
