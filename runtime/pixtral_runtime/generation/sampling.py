"""Choosing the next token from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pixtral_runtime.errors import MachineError, Option, SettingError


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


class Constraint(Protocol):
    """Which tokens one answer may have."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, so that nothing but the end may follow."""

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits (V,) with forbidden tokens at -inf."""

    def accept(self, token_id: int) -> None: ...


class Sampler:
    """Draws tokens for one answer."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self._sampling, self._constraint = sampling, constraint
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """logits (V,) -> token id. Raises MachineError for logits that are not numbers."""
        if self._constraint is None:
            return self._choose(logits)
        token_id = self._choose(self._constraint.mask(logits))
        self._constraint.accept(token_id)
        return token_id

    def _choose(self, logits: npt.NDArray[np.float32]) -> int:
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise MachineError("the model computes logits that are not numbers", "pixtral export … --dtype float32")
        if self._sampling.temperature == 0:
            return best
        below_best = logits.astype(np.float64) - np.float64(logits[best])  # 0 for the best, at any temperature
        with np.errstate(over="ignore"):  # to -inf, which is never drawn
            probabilities = np.exp(below_best / self._sampling.temperature)
        probabilities /= probabilities.sum()
        # All tokens that are rarer than this hold less than 1 - top_p together, so that none is in the set.
        likely = np.flatnonzero(probabilities >= (1 - self._sampling.top_p) / len(probabilities))
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        mass = probabilities[order].cumsum()
        kept = order[: int(np.searchsorted(mass, self._sampling.top_p)) + 1]
        return int(self._random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
