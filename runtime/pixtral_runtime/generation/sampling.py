"""Choosing the next token from a row of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pixtral_runtime.bundle.manifest import Bundle, SamplingDefaults
from pixtral_runtime.errors import MachineError, Option, SettingError
from pixtral_runtime.generation.logits import Candidates, LogitsRow, Row

MASS_ERROR = 1e-4  # of `Candidates.mass`, which is summed in float32: relative, with room


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise softmax at `temperature`, cut to the smallest set with mass `top_p`.

    top_p 0.8 is the reference's choice (specification section 3.4). The same seed gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real):
            raise SettingError(f"temperature is {self.temperature!r}", Option("temperature", 0, "or another number"))
        if not isinstance(self.top_p, Real):
            raise SettingError(f"top_p is {self.top_p!r}", Option("top_p", 0.8))
        if not isinstance(self.seed, Integral):
            raise SettingError(f"seed is {self.seed!r}", Option("seed", 0, "or another whole number"))
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature {self.temperature} is not a number of 0 or more", Option("temperature", 0))
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top-p {self.top_p} is outside 0..1", Option("top_p", 0.8))
        if self.seed < 0:
            raise SettingError(f"seed {self.seed} is negative", Option("seed", 0))


def sampling_of(
    bundle: Bundle, temperature: float | None = None, top_p: float | None = None, seed: int = 0
) -> Sampling:
    """What was asked for; where nothing was, as the bundle's checkpoint says, and greedy where it says nothing."""
    own = bundle.sampling or SamplingDefaults(Sampling.temperature, Sampling.top_p)
    return Sampling(
        own.temperature if temperature is None else temperature, top_p if top_p is not None else own.top_p, seed
    )


class Constraint(Protocol):
    """Which tokens one answer may have."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, so that nothing but the end may follow."""

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits (V,) with forbidden tokens at -inf."""

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some tokens (K,) may follow."""

    def accept(self, token_id: int) -> None: ...


class Sampler:
    """Draws tokens for one answer."""

    def __init__(
        self,
        sampling: Sampling,
        constraint: Constraint | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> None:
        """`logit_bias` is added to the logits of these tokens."""
        self._sampling, self._constraint = sampling, constraint
        self._biased = np.array(list(logit_bias or ()), np.int64)
        self._bias = np.array(list((logit_bias or {}).values()), np.float32)
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: Row | LogitsRow) -> int:
        """logits (V,) -> token id. Raises MachineError for logits that are not numbers."""
        row = logits if isinstance(logits, LogitsRow) else LogitsRow(lambda: logits)
        candidates = None if len(self._biased) else row.candidates
        token_id = None if candidates is None else self._choose_candidate(candidates)
        if token_id is None:
            whole = row.whole()
            if len(self._biased):
                whole = whole.copy()
                whole[self._biased] += self._bias
            token_id = self._choose(whole if self._constraint is None else self._constraint.mask(whole))
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return token_id

    def _choose_candidate(self, candidates: Candidates) -> int | None:
        """The token that `_choose` takes from the whole row, or None where the candidates do not tell."""
        _refuse_no_numbers(candidates.logits[0])
        # Others may be as likely as the last one, and which of them come first is not known.
        known = int(np.searchsorted(-candidates.logits, -candidates.logits[-1]))
        order = np.lexsort((candidates.ids[:known], -candidates.logits[:known]))
        ids, logits = candidates.ids[order], candidates.logits[order]
        if self._constraint is not None:
            allowed = self._constraint.allows(ids) if known else np.zeros(0, bool)
            ids, logits = ids[allowed], logits[allowed]
        if not len(ids):
            return None
        if self._sampling.temperature == 0:
            return int(ids[0])
        if self._constraint is not None:  # what the allowed tokens weigh together is not known
            return None
        weights = self._weights(logits, logits[0])
        reached, top_p = weights.cumsum() / candidates.mass, self._sampling.top_p
        least, most = (int(np.searchsorted(reached * (1 + error), top_p)) for error in (MASS_ERROR, -MASS_ERROR))
        if least != most or most >= known:
            return None
        return self._draw(ids[: most + 1], weights[: most + 1])

    def _choose(self, logits: Row) -> int:
        best = int(logits.argmax())
        _refuse_no_numbers(logits[best])
        if self._sampling.temperature == 0:
            return best
        weights = self._weights(logits, logits[best])
        probabilities = weights / weights.sum()
        # All tokens that are rarer than this hold less than 1 - top_p together, so that none is in the set.
        likely = np.flatnonzero(probabilities >= (1 - self._sampling.top_p) / len(probabilities))
        order = likely[np.lexsort((likely, -logits[likely]))]
        mass = probabilities[order].cumsum()
        kept = order[: int(np.searchsorted(mass, self._sampling.top_p)) + 1]
        return self._draw(kept, weights[kept])

    def _weights(self, logits: Row, best: np.float32) -> npt.NDArray[np.float64]:
        """Probabilities but for a factor: 1 for the best, at any temperature."""
        with np.errstate(over="ignore"):  # to -inf, which is never drawn
            return np.exp((logits.astype(np.float64) - np.float64(best)) / self._sampling.temperature)

    def _draw(self, ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> int:
        return int(self._random.choice(ids, p=weights / weights.sum()))


def _refuse_no_numbers(best: np.float32) -> None:
    if not np.isfinite(best):
        raise MachineError("the model computes logits that are not numbers", "pixtral export … --dtype float32")
