from __future__ import annotations

import numpy as np
import pytest

from pixtral_runtime.errors import InputError
from pixtral_runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))


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


def test_top_p_keeps_the_smallest_set_that_reaches_its_mass() -> None:
    seen = draws(Sampling(temperature=1.0, top_p=0.75))  # 0.5 + 0.3 reaches 0.75
    assert (seen > 0).tolist() == [False, True, True, False]
    assert (draws(Sampling(temperature=1.0, top_p=0.01), 50) > 0).tolist() == [False, True, False, False]


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS) for _ in range(40)]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**wrong)  # type: ignore[arg-type]
