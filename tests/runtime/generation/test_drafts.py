"""Prompt lookup: what followed the newest tokens the last time they stood there."""

from __future__ import annotations

import numpy as np
import pytest

from pixtral_runtime.generation.drafts import NGRAM_TOKENS, look_up


@pytest.mark.parametrize(
    ("tokens", "wanted", "drafted"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 1, [4]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3]),  # the text ends before
        ([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3], 2, [5, 6]),  # the last of two places
        ([7, 7, 7, 7], 4, [7]),  # a place that overlaps the newest tokens
        ([1, 2, 3, 1, 2, 3], 3, [1, 2, 3]),
        ([9, 2, 3, 4, 1, 2, 3], 2, []),  # two tokens stood before, three did not
        ([1, 2, 3, 4, 5, 1, 2, 3], 0, []),
        ([1, 2, 3, 4, 5, 1, 2, 3], -1, []),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_drafts_are_what_followed_the_newest_tokens_before(tokens: list[int], wanted: int, drafted: list[int]) -> None:
    assert NGRAM_TOKENS == 3
    assert look_up(np.array(tokens, np.int64), wanted) == drafted


def test_drafts_are_those_of_a_search_token_by_token() -> None:
    random = np.random.default_rng(0)
    found = 0
    for length in random.integers(0, 60, 300):
        tokens = random.integers(0, 4, length)
        newest = tokens[-NGRAM_TOKENS:].tolist()
        expected: list[int] = []
        for place in range(length - NGRAM_TOKENS):
            if tokens[place : place + NGRAM_TOKENS].tolist() == newest:
                expected = tokens[place + NGRAM_TOKENS :][:5].tolist()
        assert look_up(tokens, 5) == expected
        found += bool(expected)
    assert 50 < found < 300
