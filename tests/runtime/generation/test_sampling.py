from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pixtral_runtime.errors import InputError, MachineError
from pixtral_runtime.generation.logits import Candidates, LogitsRow
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

    def allows(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids % 2 == 0)

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


def picked(logits: np.ndarray, temperature: float, count: int, random: np.random.Generator) -> Candidates:
    """What a device picks, its mass in float32; equal logits may come in any order."""
    order = random.permutation(len(logits))
    ids = order[np.argsort(-logits[order], kind="stable")][:count]
    inverse = np.float32(1 / temperature) if temperature else np.float32(1)
    mass = np.exp((logits - logits.max()) * inverse, dtype=np.float32).sum(dtype=np.float32)
    return Candidates(ids, logits[ids], float(mass))


def test_candidates_choose_what_the_whole_row_does() -> None:
    """10,000 distributions from flat to peaked, with float16's ties; the row is asked for where it has to be."""
    random, asked = np.random.default_rng(0), 0
    for case in range(10_000):
        spread, size = random.choice([0.3, 1, 3, 8]), int(random.choice([40, 500, 2000]))
        logits = (random.standard_normal(size) * spread).astype(np.float16).astype(np.float32)
        temperature, top_p = random.choice([0, 0.01, 0.3, 0.7, 1, 2]), random.choice([0.1, 0.5, 0.8, 0.95])
        sampling = Sampling(float(temperature), float(top_p), seed=case)
        constraint = Even() if case % 5 == 0 else None
        fetched: list[int] = []

        def whole(logits: np.ndarray = logits, fetched: list[int] = fetched) -> np.ndarray:
            fetched.append(1)
            return logits

        row = LogitsRow(whole, picked(logits, sampling.temperature, 32, random))
        ours, theirs = Sampler(sampling, constraint), Sampler(sampling, constraint)
        for _ in range(3 if case % 10 == 0 else 1):  # the random numbers of later tokens too
            assert ours(row) == theirs(logits), (case, sampling, spread, size)
        asked += bool(fetched)
    assert 500 < asked < 5_000


def test_a_tie_that_goes_on_beyond_the_candidates_is_settled_by_the_whole_row() -> None:
    logits = np.full(100, 2.5, np.float32)
    row = LogitsRow(lambda: logits, Candidates(np.array([7, 50]), logits[:2], 100.0))
    assert Sampler(Sampling())(row) == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_candidates_that_are_not_numbers_are_an_error(wrong: float) -> None:
    row = LogitsRow(lambda: LOGITS, Candidates(np.array([1, 0]), np.array([wrong, 1], np.float32), 1.0))
    with pytest.raises(MachineError, match="not numbers"):
        Sampler(Sampling())(row)
