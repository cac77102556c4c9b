"""Divergence over the likeliest tokens: the whole one where they are all, and never more than it."""

from __future__ import annotations

import numpy as np
import pytest

from pixtral_runtime.compare.divergence import kl_nats
from pixtral_runtime.evaluation.tuning_divergence import divergence_nats
from pixtral_runtime.generation.logits import log_softmax

VOCABULARY = 500


def both(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Logarithms of eight tokens' predictions by two models, and their mean divergence over the whole vocabulary."""
    random = np.random.default_rng(seed)
    ours = random.normal(0, 3, (8, VOCABULARY))
    theirs = ours + random.normal(0, spread, ours.shape)
    whole = float(np.mean([kl_nats(one, other) for one, other in zip(ours, theirs, strict=True)]))
    return np.stack([*map(log_softmax, ours)]), np.stack([*map(log_softmax, theirs)]), whole


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_over_all_tokens_it_is_the_whole_divergence(spread: float) -> None:
    ours, theirs, whole = both(spread, 0)
    assert divergence_nats(ours, theirs) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kept", [1, 16, 128])
@pytest.mark.parametrize("seed", range(5))
def test_over_the_likeliest_it_is_never_more(kept: int, seed: int) -> None:
    ours, theirs, whole = both(0.3, seed)
    likeliest = np.argsort(-ours, 1)[:, :kept]
    part = divergence_nats(*(np.take_along_axis(nats, likeliest, 1) for nats in (ours, theirs)))
    assert 0 < part <= whole
    assert kept < 128 or part > 0.9 * whole


def test_models_that_predict_alike_have_none() -> None:
    ours, _, _ = both(1, 0)
    assert divergence_nats(ours[:, :5], ours[:, :5]) == 0
