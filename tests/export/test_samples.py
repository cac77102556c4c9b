"""The packaged calibration samples: both kinds wherever some are taken, and small enough to travel in the wheel."""

from __future__ import annotations

import pytest

from pixtral_export.quantization.calibrate import judges
from pixtral_export.quantization.samples import DEFAULT_SAMPLES, TEXTS, _spread, packaged_requests


def test_the_default_takes_every_packaged_sample_once() -> None:
    requests = packaged_requests()
    assert len(requests) == len({request.prompt + str(request.images) for request in requests}) == DEFAULT_SAMPLES
    assert sum(not request.images for request in requests) == 3 * sum(bool(request.images) for request in requests)


@pytest.mark.parametrize("count", range(2, 33))
def test_any_few_packaged_samples_hold_text_and_pictures(count: int) -> None:
    taken = list(_spread(packaged_requests(), count))[:count]
    assert {bool(request.images) for request in taken} == {True, False}


def test_samples_that_judge_hold_text_and_pictures() -> None:
    requests = packaged_requests()
    assert {bool(requests[n].images) for n in judges(len(requests))} == {True, False}


def test_the_packaged_texts_are_of_many_kinds_and_small() -> None:
    texts = TEXTS.read_text(encoding="utf-8")
    assert TEXTS.stat().st_size < 25_000
    for part in ("def ", "#include", "SELECT", "| --- |", '{"order"', "\\int_0", "<form", "ü", "é", "请", "の"):
        assert part in texts
