"""The cheapest of several settings that answers as well as the best: examples are asked in rounds, the same of all.

Each round has twice as many examples as the one before, and settings that cannot win any more are asked no further, as
in successive halving (Jamieson and Talwalkar, AISTATS 2016). What ends a setting is a paired interval, as in racing
(Maron and Moore, NIPS 1993), not its rank. The interval is Tango's for paired shares (Statistics in Medicine 17, 1998),
with the mean square of the differences in the place of the share of changed answers, so that scores between 0 and 1
have one as well; it is no point where no answer has changed yet. It is as wide as six looks at it ask for (Pocock,
Biometrika 64, 1977): it holds in whatever round a setting is stopped.

Scores are from 0 to 1, and NaN where an example gave none; costs are of one example, in any unit. Nothing here knows
models: who answers is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pixtral_runtime.errors import Option, SettingError

TOLERANCE = 0.02
LEAST_TOLERANCE = 1e-6
ROUNDS = 6
Z = 2.546  # 95 % of the largest of ROUNDS normal deviates, each of twice as much as the one before, lie within
LUCK = 1  # standard errors that a difference may be smaller than it was seen, before it is given up
FEWEST = 16  # examples of the first round

State = Literal["recommended", "enough", "worse", "dearer", "undecided"]
Scores = npt.NDArray[np.float64]


Answer = Callable[[int, int], Scores]
"""The scores of the first so many examples by a setting, by its number; it may have answered some of them before."""
Cost = Callable[[int], float]
"""What an example costs a setting, as far as it has answered."""
Afford = Callable[[Sequence[int]], int]
"""How many more examples each of these settings may be asked."""


@dataclass(frozen=True)
class Interval:
    """A mean of `n` examples between its bounds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Standing:
    """What is known of a setting. `difference` is its score less the best's, on the examples that both answered.

    recommended: the cheapest that is enough. enough: not more than the tolerance below any other. worse: more than
    that. dearer: asked no further, as a cheaper one was enough. undecided: the examples do not tell.
    """

    state: State
    score: Interval
    difference: Interval
    cost: float
    asked: int
    on_front: bool


@dataclass(frozen=True)
class Tuned:
    """The standings by setting, and which one scores best. `recommended` is None where the examples cannot tell.

    Then `more` says how many more it takes at least, if answers go on as they did. `spent` is what was asked, `full`
    what asking every setting every example would cost.
    """

    standings: Sequence[Standing]
    best: int
    recommended: int | None
    more: int | None
    spent: float
    full: float


def least_examples(tolerance: float) -> int:
    """How many examples it takes to tell, where no answer changes at all."""
    return math.ceil(Z * Z * (1 - tolerance) / tolerance)


def rounds_of(examples: int, tolerance: float) -> list[int]:
    """How many examples have been asked after each round: twice as many each time, none beyond what there is."""
    first = max(FEWEST, math.ceil(least_examples(tolerance) / 8))
    planned = [first << number for number in range(ROUNDS)]
    return [*(count for count in planned if count < examples), min(examples, planned[-1])]


def tune(
    settings: int,
    examples: int,
    answer: Answer,
    cost: Cost,
    *,
    tolerance: float = TOLERANCE,
    kept: int | None = None,
    afford: Afford | None = None,
) -> Tuned:
    """Ask so many settings about so many examples, which are in random order, until the cheapest good one is known.

    The setting `kept` is asked in every round, as others are judged by its answers. `afford` bounds the work: it is
    asked once before anything was answered, and then in each round. Raises SettingError for a tolerance that is no
    share, or where `afford` does not allow an example of each setting.
    """
    race = _Race(settings, answer, cost, checked_tolerance(tolerance))
    done, rounds = 0, rounds_of(examples, tolerance)
    if afford is not None:
        if afford(race.alive) < 1:
            raise SettingError(
                f"the budget is not enough for one example of each of {settings} settings", Option("budget", settings)
            )
        done = 1
        race.ask(done)  # what one takes is known then
    for wanted in rounds:
        count = wanted if afford is None else min(wanted, done + afford(race.alive))
        if count > done:
            race.ask(count)
        done = max(done, count)
        if race.is_decided(kept, rounds[-1]) or done < wanted:
            break
    return race.result(examples, kept)


def checked_tolerance(tolerance: float) -> float:
    """The tolerance, between 0 and 1. Raises SettingError."""
    if not LEAST_TOLERANCE <= tolerance < 1:
        raise SettingError(f"a tolerance of {100 * tolerance:g} points", Option("tolerance", 2, "points of 100"))
    return tolerance


def mean_interval(values: Scores, low: float) -> Interval:
    """Of values from `low` to 1, -1 for differences and 0 for scores; NaN counts nowhere."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Interval(0.0, low, 1.0, 0)
    mean, square = float(known.mean()), float((known * known).mean())
    if low == 0:
        spread = Z * Z / len(known)  # Wilson's: no scores from 0 to 1 vary more than right and wrong ones
        centre = (mean + spread / 2) / (1 + spread)
        half = math.sqrt(spread * mean * (1 - mean) + spread * spread / 4) / (1 + spread)
        return Interval(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), len(known))
    return Interval(mean, -_upper(-mean, square, len(known)), _upper(mean, square, len(known)), len(known))


def _upper(mean: float, square: float, n: int) -> float:
    """The largest difference that the observed one does not speak against."""
    least, most = mean, 1.0
    for _ in range(40):
        middle = (least + most) / 2
        if _examples_to_exclude(middle, mean, square) > n:
            least = middle
        else:
            most = middle
    return most


def _examples_to_exclude(difference: float, mean: float, square: float) -> float:
    """How many examples of such a mean and mean square exclude so large a difference."""
    if difference <= mean:
        return math.inf
    return Z * Z * (max(square, abs(difference)) - difference * difference) / (difference - mean) ** 2


class _Race:
    """Settings with what they have answered so far; `alive` are asked further."""

    def __init__(self, settings: int, answer: Answer, cost: Cost, tolerance: float) -> None:
        self.alive = list(range(settings))
        self._answer, self._cost, self._tolerance = answer, cost, tolerance
        self._scores = [np.empty(0)] * settings
        self._states: list[State] = ["undecided"] * settings

    def ask(self, count: int) -> None:
        for setting in self.alive:
            self._scores[setting] = self._answer(setting, count)

    def is_decided(self, kept: int | None, examples: int) -> bool:
        """Stop what cannot win; say whether anything cheaper than the cheapest good one is still open.

        What so many examples would hardly show to be enough, if answers go on as they did, is left undecided.
        """
        best = self._best(self.alive)
        enough = self._cheapest_enough()
        for setting in list(self.alive):
            ahead = self._ahead(best, setting)
            if ahead.low > self._tolerance:
                self._states[setting] = "worse"
            elif enough is not None and self._order(setting) > self._order(enough):
                self._states[setting] = "dearer"
            elif enough is None or setting == enough or self._to_be_enough(best, setting) <= examples:
                continue
            if setting != kept:
                self.alive.remove(setting)
        return enough is not None and set(self.alive) <= {enough, kept}

    def _to_be_enough(self, best: int, setting: int) -> float:
        """Examples after which a setting could be called enough, if it is lucky."""
        mean, square = self._moments(best, setting)
        luck = LUCK * math.sqrt(max(square - mean * mean, 0) / max(1, self._ahead(best, setting).n))
        return _examples_to_exclude(self._tolerance, mean - luck, square)

    def result(self, examples: int, kept: int | None) -> Tuned:
        """The race as it stands."""
        chosen = self._cheapest_enough()
        anchor = self.alive[0] if chosen is None else chosen
        best = kept if kept is not None else self._best(range(len(self._scores)), anchor)
        if chosen is not None:
            self._states[chosen] = "recommended"
        differences = [self._ahead(setting, best) for setting in range(len(self._scores))]
        front = self._front(differences)
        standings = []
        for setting, scores in enumerate(self._scores):
            state = self._states[setting]
            if state == "undecided" and self._is_enough(setting):
                state = "enough"
            score, asked = mean_interval(scores, 0), len(scores)
            standing = Standing(state, score, differences[setting], self._cost(setting), asked, setting in front)
            standings.append(standing)
        spent = sum(standing.asked * standing.cost for standing in standings)
        full = examples * sum(standing.cost for standing in standings)
        return Tuned(standings, best, chosen, self._more() if chosen is None else None, spent, full)

    def _order(self, setting: int) -> tuple[float, int]:
        return self._cost(setting), setting

    def _best(self, settings: Iterable[int], anchor: int | None = None) -> int:
        """Whose score is highest, the cheapest of equals; by the lead over `anchor` where not all answered as much."""
        listed = sorted(settings, key=self._order)
        if anchor is None:
            anchor = listed[0]
        leads = {setting: self._ahead(setting, anchor).mean for setting in listed}
        return max(listed, key=lambda setting: leads[setting])

    def _ahead(self, one: int, other: int) -> Interval:
        """How far one setting's score is above another's, on what both answered."""
        return mean_interval(self._leads(one, other), -1)

    def _moments(self, one: int, other: int) -> tuple[float, float]:
        """Mean and mean square of one setting's lead over another."""
        leads = self._leads(one, other)
        known = leads[~np.isnan(leads)]
        return (float(known.mean()), float((known * known).mean())) if len(known) else (0.0, 0.0)

    def _leads(self, one: int, other: int) -> Scores:
        a, b = self._scores[one], self._scores[other]
        both = min(len(a), len(b))
        return a[:both] - b[:both]

    def _cheapest_enough(self) -> int | None:
        found = (setting for setting in sorted(self.alive, key=self._order) if self._is_enough(setting))
        return next(found, None)

    def _is_enough(self, setting: int) -> bool:
        """Surely not far below any that is still asked, and not seen far below any that is not."""
        if setting not in self.alive:
            return False
        for other in range(len(self._scores)):
            ahead = self._ahead(other, setting)
            if (ahead.high if other in self.alive else ahead.mean) > self._tolerance and other != setting:
                return False
        return True

    def _front(self, differences: Sequence[Interval]) -> set[int]:
        """Settings that no cheaper one equals."""
        front: set[int] = set()
        reached = -math.inf
        for setting in sorted(range(len(differences)), key=self._order):
            if differences[setting].mean > reached:
                front.add(setting)
                reached = differences[setting].mean
        return front

    def _more(self) -> int | None:
        """Examples that it takes beyond those asked, until the first setting could be called enough."""
        needed = []
        for setting in self.alive:
            lacks = []
            for other in set(self.alive) - {setting}:
                wants = _examples_to_exclude(self._tolerance, *self._moments(other, setting))
                lacks.append(wants - self._ahead(other, setting).n)
            needed.append(max(lacks, default=0.0))
        least = min(needed, default=math.inf)
        return None if math.isinf(least) else max(1, math.ceil(least))
