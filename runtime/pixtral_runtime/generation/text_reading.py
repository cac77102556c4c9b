"""What a model predicts at every token of a text that it reads, and not of one that it writes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import KVCache
from pixtral_runtime.errors import BundleError
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.prompt import Prompt


def logits_by_chunk(
    model: Model, prompt: Prompt, cache: KVCache, *, start: int = 0
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Read a prompt of text from token `start` on: the first token of each chunk, and the logits (n, V) after each of
    its tokens. Rows of the cache before `start` must be there.

    Chunks come one at a time, as those of a long text do not fit in memory together: 2,048 rows of a vocabulary of
    131,072 are a gigabyte. Engines have no room for more logits than slots, so with them a chunk is one token.
    Raises BundleError where logits are not numbers.
    """
    cache.reserve(len(prompt.token_ids) + 1)
    sessions = model.runner.sessions
    for first in range(start, len(prompt.token_ids), sessions.chunk if sessions.slots is None else 1):
        logits = _logits_from(model, prompt, cache, first)
        _check_finite(model, logits)
        yield first, logits


def last_logits(model: Model, prompt: Prompt, cache: KVCache, *, start: int = 0) -> npt.NDArray[np.float32]:
    """The logits (V,) after a prompt of text, read from token `start` on. Raises as `logits_by_chunk`."""
    row: npt.NDArray[np.float32] = model.runner.prefill(prompt, model.runner.no_features, cache, start=start)[-1]
    _check_finite(model, row)
    return row


def text_nats(model: Model, prompt: Prompt, cache: KVCache) -> npt.NDArray[np.float64]:
    """How unlikely each token of a prompt but the first was to the model, in nats, (T - 1,)."""
    read = Prompt(prompt.token_ids[:-1], prompt.feature_index[:-1], (), 0)  # what follows the last is not asked
    told = [_nats(logits, prompt.token_ids[first + 1 :]) for first, logits in logits_by_chunk(model, read, cache)]
    return np.concatenate(told)


def _logits_from(model: Model, prompt: Prompt, cache: KVCache, first: int) -> npt.NDArray[np.float32]:
    """Of one chunk, (n, V)."""
    runner = model.runner
    if runner.sessions.slots is not None:
        return runner.decode_token(int(prompt.token_ids[first]), first, cache)[None]
    return runner.prefill_chunk(prompt, runner.no_features, cache, first, all_logits=True).numpy()


def _nats(logits: npt.NDArray[np.float32], following: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of the token after each row (n, V)."""
    nats = np.empty(len(logits))
    for row, (values, token) in enumerate(zip(logits, following, strict=False)):
        highest = values.max()
        mass = np.exp(values - highest).sum(dtype=np.float64)
        nats[row] = np.log(mass) + float(highest) - float(values[token])
    return nats


def _check_finite(model: Model, logits: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise BundleError(
            f"{model.bundle.path} computes logits that are not numbers, so it predicts nothing",
            f"pixtral export CHECKPOINT -o {model.bundle.path} --force --dtype float32",
        )
