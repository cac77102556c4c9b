from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pixtral_runtime.errors import InputError, MachineError
from pixtral_runtime.generation.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))


@pytest.mark.parametrize("wrong", [{"temperature": "1"}, {"top_p": None}, {"seed": 1.5}, {"seed": [1]}])
def test_what_is_no_number_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
        Sampling(**wrong)


def draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=4) / count


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert Sampler(Sampling())(LOGITS) == 1


def test_draws_follow_the_softmax() -> None:
    np.testing.assert_allclose(draws(Sampling(temperature=1.0, top_p=1.0)), np.exp(LOGITS), atol=0.04)  # seen 0.010


def test_temperature_sharpens() -> None:
    cold = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(draws(Sampling(temperature=0.5, top_p=1.0)), cold / cold.sum(), atol=0.04)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-5, 1e-310, 5e-324])
@pytest.mark.parametrize("offset", [0.0, 1e30, -1e30])
def test_tiny_temperatures_are_greedy(temperature: float, offset: float) -> None:
    logits = np.array([1, 3, 2, -np.inf], np.float32) * max(abs(offset), 1) + offset
    assert Sampler(Sampling(temperature, top_p=1.0))(logits) == 1


def test_top_p_keeps_the_smallest_set_that_reaches_its_mass() -> None:
    seen = draws(Sampling(temperature=1.0, top_p=0.75))  # 0.5 + 0.3 reaches 0.75
    assert (seen > 0).tolist() == [False, True, True, False]
    assert (draws(Sampling(temperature=1.0, top_p=0.01), 50) > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("top_p", [0.05, 0.8, 0.999, 1.0])
def test_draws_are_those_of_a_full_sort(top_p: float) -> None:
    logits = np.random.default_rng(0).standard_normal(5000).round(1).astype(np.float32) * 3  # with many ties
    sampler, random = Sampler(Sampling(temperature=1.0, top_p=top_p)), np.random.default_rng(0)
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
    for _ in range(200):
        assert sampler(logits) == random.choice(kept, p=probabilities[kept] / probabilities[kept].sum())


class Even:
    """Allows tokens of even ids, and remembers those that were chosen."""

    is_complete = False

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_a_constraint_is_obeyed_and_told(temperature: float) -> None:
    constraint = Even()
    choose = Sampler(Sampling(temperature=temperature, top_p=1.0), constraint)
    drawn = [choose(LOGITS) for _ in range(50)]
    assert set(drawn) == ({2} if temperature == 0 else {0, 2})
    assert constraint.accepted == drawn


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_an_error(temperature: float, wrong: float) -> None:
    with pytest.raises(MachineError, match="not numbers"):
        Sampler(Sampling(temperature=temperature))(np.array([0, wrong, 1], np.float32))
    with pytest.raises(MachineError, match="not numbers"):
        Sampler(Sampling(temperature=temperature))(np.full(3, -np.inf, np.float32))


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS) for _ in range(40)]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong)).replace("_", ".")):
        Sampling(**wrong)  # type: ignore[arg-type]
