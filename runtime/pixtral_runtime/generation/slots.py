"""The slots of a cache: which rows each one holds, which generation runs in it, and the memory that all of them share.

A slot that becomes free keeps its rows. The next prompt that begins as one of the slots does takes these rows from
there instead of computing them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import KVCache, Session
from pixtral_runtime.errors import PixtralError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.logits import LogitsRow, token_logprob
from pixtral_runtime.generation.model_runner import Features
from pixtral_runtime.generation.sampling import Sampler
from pixtral_runtime.inputs.prompt import Prompt

LEAST_COPIED_ROWS = 16  # rows; fewer are computed again sooner than copied from another slot


@dataclass(eq=False)
class Slot:
    """One slot, free or not. `keys` says what each of its `filled` rows was computed from (`Prompt.row_keys`)."""

    index: int
    keys: npt.NDArray[np.int64]  # (context,)
    filled: int = 0

    def shared(self, keys: npt.NDArray[np.int64]) -> int:
        """How many rows from the start hold what a prompt with these keys (T,) needs."""
        length = min(self.filled, len(keys))
        different = np.flatnonzero(self.keys[:length] != keys[:length])
        return int(different[0]) if len(different) else length

    def append(self, key: int) -> None:
        """Count a row that was written behind the filled ones."""
        self.keys[self.filled] = key
        self.filled += 1


@dataclass(eq=False)
class RunningSlot:
    """A slot while a generation has it: first its prompt is read, chunk by chunk, then its answer is decoded.

    `features` are there from the first chunk of the prompt to the last.
    """

    slot: Slot
    generation: Generation
    sampler: Sampler
    features: Features | None = None  # (F, D) of the prompt's images

    def choose(self, logits: Sequence[LogitsRow], draft: list[int], eos: int) -> bool:
        """Take the next tokens: one for the first row of logits, and one more for each drafted token that was right.

        `logits` are the rows after the newest token and after each token of the draft. Returns whether that ended
        the answer.
        """
        generation = self.generation
        if generation.token_ids:  # the token that was read in this step has its row now
            self.slot.append(generation.token_ids[-1])
        for row, drafted in zip(logits, [*draft, None], strict=True):
            try:
                token = self.sampler(row)
            except PixtralError as error:
                generation.fail(error)
                break
            generation.token_ids.append(token)
            if generation.top_logprobs is not None:
                generation.logprobs.append(token_logprob(row.whole(), token, generation.top_logprobs))
            if generation.text is not None and token != eos:
                generation.text.push(token)
            is_stopped = generation.text is not None and generation.text.is_stopped
            if token == eos or is_stopped or (generation.constraint is not None and generation.constraint.is_complete):
                generation.finish_reason = "stop"
            elif len(generation.token_ids) == generation.max_new_tokens:
                generation.finish_reason = "length"
            if generation.finish_reason or token != drafted:
                break
            self.slot.append(token)
        return generation.finish_reason is not None


class SlotCache:
    """The slots and the one cache that they share, which is made when rows are needed for the first time."""

    def __init__(self, decoder: Session, slots: int, context: int) -> None:
        """`context` is the most rows that a slot can ever have."""
        self.slots = [Slot(index, np.zeros(context, np.int64)) for index in range(slots)]
        self._decoder = decoder
        self._cache: KVCache | None = None

    @property
    def rows(self) -> int:
        """Rows that each slot has now."""
        return 0 if self._cache is None else self._cache.rows

    def reserve(self, rows: int) -> KVCache:
        """The cache, with at least `rows` rows a slot. Raises InputError where the backend has no more."""
        if self._cache is None:
            self._cache = self._decoder.new_cache(len(self.slots), rows)
        self._cache.reserve(rows)
        return self._cache

    def shrink(self, needed: int) -> None:
        """Give rows back, where more than half are not needed: attention reads all of them."""
        if self._cache is not None and 2 * needed < self._cache.rows:
            self._cache.shrink(needed)
            for slot in self.slots:
                slot.filled = min(slot.filled, self._cache.rows)

    def forget(self) -> None:
        """Hold no rows any more, as what they hold is not known."""
        self._cache = None
        for slot in self.slots:
            slot.filled = 0

    def begin(self, slot: Slot, prompt: Prompt) -> int:
        """Give a slot the rows of its prompt that some slot has already. Returns how many these are.

        The last token is always left to be read, for its logits.
        """
        cache = self.reserve(len(prompt.token_ids) + 1)
        keys, most = prompt.row_keys, len(prompt.token_ids) - 1
        start = min(slot.shared(keys), most)
        other = max(self.slots, key=lambda other: other.shared(keys))
        if (there := min(other.shared(keys), most)) >= start + LEAST_COPIED_ROWS:
            cache.copy_rows(other.index, slot.index, there)
            start = there
        slot.keys[: len(keys)] = keys
        slot.filled = start
        return start
