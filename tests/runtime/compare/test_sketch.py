"""A tensor's sketch tells how far another one is, whatever has become of the values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from pixtral_runtime.compare.certify import rounded_up
from pixtral_runtime.compare.sketch import distance, noise, sketch_of

Array = npt.NDArray[np.float64]


def tensor(*shape: int) -> Array:
    return np.random.default_rng(3).standard_normal(shape)


@pytest.mark.parametrize("share", [1e-3, 1e-2, 0.1, 0.5])
def test_the_distance_is_about_that_of_the_tensors(share: float) -> None:
    first, other = tensor(40, 60), np.random.default_rng(4).standard_normal((40, 60))
    apart = distance(sketch_of(first + share * other), sketch_of(first))
    assert apart == pytest.approx(share, rel=0.6)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.T.reshape(a.shape),
        lambda a: -a,
        lambda a: a[::-1],
        lambda a: np.roll(a, 1, axis=1),
        lambda a: a * 1.05,
        lambda a: a + 0.05,
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 77, 9.0, a),
    ],
    ids=["transposed", "sign", "rows", "columns", "scale", "offset", "one value"],
)
def test_every_kind_of_change_is_seen(change: Callable[[Array], Array]) -> None:
    values = tensor(30, 50)
    assert distance(sketch_of(change(values)), sketch_of(values)) > 0.02


def test_the_same_values_in_other_dtypes_and_orders_of_memory_are_no_difference() -> None:
    values = tensor(30, 50).astype(np.float16)
    for same in (values.astype(np.float32), np.asfortranarray(values)):
        assert distance(sketch_of(same), sketch_of(values)) == 0


def test_other_shapes_and_numbers_that_are_none_are_infinitely_far() -> None:
    values = tensor(4, 6)
    assert distance(sketch_of(values.reshape(6, 4)), sketch_of(values)) == math.inf
    values[1, 2] = np.nan
    assert distance(sketch_of(values), sketch_of(tensor(4, 6))) == math.inf


def test_of_nothing_and_of_zeros() -> None:
    assert distance(sketch_of(np.zeros((0, 3))), sketch_of(np.zeros((0, 3)))) == 0
    assert distance(sketch_of(np.zeros(3)), sketch_of(np.zeros(3))) == 0
    assert distance(sketch_of(np.ones(3)), sketch_of(np.zeros(3))) > 1e6


def test_noise_and_sketch_are_the_same_for_ever() -> None:
    """Certificates that lie beside bundles hold what these give."""
    assert noise("sketch", 6).tolist() == [209, 158, 53, 100, 212, 91]
    sums = (0.0, 0.0, 0.0, 0.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 7.0, -1.0, -6.0)
    assert sketch_of(np.arange(8.0)).sums == sums


def test_figures_are_rounded_up_to_steps_that_noise_does_not_cross() -> None:
    assert [rounded_up(value) for value in (3.1e-3, 5e-3, 5.1e-3, 0.0, 1.0, 812.0, math.inf)] == [
        5e-3, 5e-3, 1e-2, 0.0, 1.0, 1000.0, math.inf,
    ]  # fmt: skip
