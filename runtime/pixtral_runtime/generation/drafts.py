"""Drafts: tokens that an answer may go on with, guessed without the model (prompt lookup).

Answers repeat what stands before them. Where the newest tokens stood before, in the prompt or in the answer, what
followed there is a good guess, and the model can check several guesses in one step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NGRAM_TOKENS = 3  # tokens that must have stood before for a draft


def look_up(tokens: npt.NDArray[np.int64], wanted: int) -> list[int]:
    """The tokens that followed the last place where the newest tokens stood before.

    `tokens` (T,) are prompt and answer so far. Returns at most `wanted` tokens: fewer where the text ends before, none
    where the newest `NGRAM_TOKENS` stand for the first time.
    """
    if wanted < 1 or len(tokens) <= NGRAM_TOKENS:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], NGRAM_TOKENS)  # (T - NGRAM_TOKENS, NGRAM_TOKENS)
    places = np.flatnonzero((windows == tokens[-NGRAM_TOKENS:]).all(axis=1))
    if not len(places):
        return []
    after = int(places[-1]) + NGRAM_TOKENS
    return [int(token) for token in tokens[after : after + wanted]]
