"""How far two results are apart: noise of tensors, KL of predictions, similarity of texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.generation.logits import log_softmax


@dataclass
class Noise:
    """Sums of squares from which a signal-to-noise ratio follows."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, candidate: Array) -> None:
        exact = reference.astype(np.float64)
        self.signal += float(np.square(exact).sum())
        self.noise += float(np.square(exact - candidate).sum())

    @property
    def snr_db(self) -> float | None:
        """10 log10(signal / noise), None without noise."""
        if self.noise == 0:
            return None
        return float(10 * np.log10(max(self.signal, sys.float_info.min) / self.noise))


def kl_nats(reference: Array, candidate: Array) -> float:
    """KL(reference || candidate) of the softmax of two rows of logits (V,)."""
    ours, theirs = log_softmax(reference), log_softmax(candidate)
    return max(0.0, float((np.exp(ours) * (ours - theirs)).sum()))  # rounding may leave -1e-17


def top2_gap_nats(logits: Array) -> float:
    """How much likelier, in nats, the best token of a row (V,) is than the second."""
    second, first = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(first - second)


def word_similarity(reference: str, answer: str) -> float:
    return SequenceMatcher(None, reference.split(), answer.split(), autojunk=False).ratio()


def first_difference(reference: Sequence[int], answer: Sequence[int]) -> int | None:
    """The first index where two sequences differ; the shorter one's length where it is the other's beginning."""
    pairs = enumerate(zip(reference, answer, strict=False))
    shorter = min(len(reference), len(answer))
    first = next((index for index, (ours, theirs) in pairs if ours != theirs), shorter)
    return None if first == len(reference) == len(answer) else first
