"""Logits where the backend keeps them, with what it picked out of them, so that whole rows rarely travel.

A row of a vocabulary of 131,072 is half a megabyte, and a softmax over it costs the host milliseconds. A backend that
picks candidates hands over a few hundred bytes a row instead; `Sampler` asks for the row where these do not settle
which token is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import Buffer

Row = npt.NDArray[np.float32]  # (V,)


@dataclass(frozen=True)
class Candidates:
    """The tokens with the highest logits of a row. Those that are missing have none above the last one's.

    `ids` and `logits` (K,), the highest first. `mass` is the sum over the whole row of
    exp((logit - highest) / temperature), in float32.
    """

    ids: npt.NDArray[np.int64]
    logits: Row
    mass: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats among all of the vocabulary, as the model computed it: nothing forbidden,
    nothing added, at temperature 1. `top` has the likeliest tokens, the first first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LogitsRow:
    """Logits after one token. `whole` fetches the row (V,)."""

    whole: Callable[[], Row]
    candidates: Candidates | None = None


class Logits:
    """Logits (R, V) of one run. `picked` (R, 2K + 1) holds K logits, K ids and the mass of each row."""

    def __init__(self, buffer: Buffer, picked: Buffer | None = None) -> None:
        self._buffer, self._picked = buffer, picked
        self._rows: npt.NDArray[np.float32] | None = None

    def numpy(self) -> npt.NDArray[np.float32]:
        """All rows, (R, V)."""
        if self._rows is None:
            self._rows = np.asarray(self._buffer.numpy(), np.float32)
        return self._rows

    def row(self, index: int) -> Row:
        """One row, (V,)."""
        row: Row = self.numpy()[index]
        return row

    def __iter__(self) -> Iterator[LogitsRow]:
        if self._picked is None:
            yield from (LogitsRow(partial(self.row, index)) for index in range(len(self.numpy())))
            return
        rows = self._picked.numpy()
        count = rows.shape[1] // 2
        for index, picked in enumerate(rows):
            candidates = Candidates(picked[count : 2 * count].astype(np.int64), picked[:count], float(picked[-1]))
            yield LogitsRow(partial(self.row, index), candidates)


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The logarithm of each token's probability, in nats, for a row of logits (V,)."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def token_logprob(logits: Row, token_id: int, top: int) -> TokenLogprob:
    """A token's log-probability after these logits (V,), and those of the `top` likeliest."""
    logprobs = log_softmax(logits)
    best = np.argsort(-logits, kind="stable")[:top] if top else ()
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple((int(one), float(logprobs[one])) for one in best))
