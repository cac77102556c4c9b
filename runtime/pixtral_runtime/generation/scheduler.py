"""Continuous batching: many requests share one cache, a slot each, and a slot that is done is filled again at once.

A step encodes images that will be wanted, reads a chunk of a prompt and decodes one token for every running answer:

    submit ─▶ waiting ─vision─▶ waiting, encoded ─admit─▶ slot: prefill, chunk by chunk ─▶ slot: decode ─▶ finished

- Vision runs ahead: the next requests are encoded before a slot is free, images of one patch grid together, an image
  that several requests show once.
- Prefill runs slot by slot. While fewer than half of the taken slots decode, chunks go one after the other; from then
  on there is one chunk a step, so that running answers never wait for more.
- Rows that a slot holds already are not computed again: before a prompt is read, the longest beginning that it shares
  with any slot's rows is copied (system prompt; the same image, asked something else; the turns before).
- Drafts (prompt lookup): where an answer's last tokens stood before, in the prompt or in the answer, the tokens that
  followed there are tried in the same step. Each is kept only if it is the token that would have been chosen anyway.

Free slots below a running one are decoded along, onto a row that nothing reads before it is written again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import Array, KVCache
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import InputError, PixtralError
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.sampling import Sampler, Sampling
from pixtral_runtime.inputs.prompt import Prompt

if TYPE_CHECKING:
    from pixtral_runtime.generation.feature_cache import FeatureCache
    from pixtral_runtime.generation.sampling import Constraint

LEAST_COPIED_ROWS = 16  # rows; fewer are computed again sooner than copied from another slot
NGRAM_TOKENS = 3  # tokens that must have stood before for a draft


@dataclass
class StageTimes:
    """Where a request's time went, in milliseconds. A step that serves several requests counts for each in full."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


@dataclass(eq=False)
class Generation:
    """One request, and what has become of it. `finish_reason` is None until it is done; then `error` may be set."""

    prompt: Prompt
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: PixtralError | None = None
    reused_tokens: int = 0
    times: StageTimes = field(default_factory=StageTimes)


@dataclass(eq=False)
class _Slot:
    """A row of the cache. `keys` says what each of its `filled` rows was computed from (`Prompt.row_keys`)."""

    index: int
    keys: npt.NDArray[np.int64]  # (context,)
    filled: int = 0
    generation: Generation | None = None
    sampler: Sampler | None = None
    features: Array | None = None  # (F, D) of the prompt's images while it is read

    @property
    def running(self) -> bool:
        return self.generation is not None and bool(self.generation.token_ids)

    def shared(self, keys: npt.NDArray[np.int64]) -> int:
        """How many rows from the start hold what a prompt with these keys needs."""
        length = min(self.filled, len(keys))
        different = np.flatnonzero(self.keys[:length] != keys[:length])
        return int(different[0]) if len(different) else length


class Scheduler:
    """Answers generations in `slots` slots. Single-threaded: `submit` some, then `step` until nothing is `busy`.

    `times` adds up what the stages took, each step once.
    """

    def __init__(
        self,
        bundle: Bundle,
        runner: ModelRunner,
        slots: int = 1,
        *,
        drafts: int = 0,
        features: FeatureCache | None = None,
    ) -> None:
        self._bundle, self._runner = bundle, runner
        limits = (bundle.limits.max_context, runner.sessions.context)
        self._context = min(limit for limit in limits if limit is not None)
        self._slots = [_Slot(index, np.zeros(self._context, np.int64)) for index in range(slots)]
        self._drafts = drafts if runner.sessions.drafts else 0
        self._waiting: deque[Generation] = deque()
        self._prefilling: deque[_Slot] = deque()
        self._features: dict[bytes, Array] = {}  # of images by content, the newest last
        self._disk = features
        self._cache: KVCache | None = None
        self.times = StageTimes()

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(slot.generation for slot in self._slots)

    def submit(self, generation: Generation) -> None:
        """Queue one; its answer is cut where the context ends. Raises InputError where the prompt does not fit."""
        room = self._context - len(generation.prompt.token_ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(generation.prompt.token_ids)} tokens, the cache {self._context} rows a slot",
                f"--image-tokens N for smaller images, or pixtral build {self._bundle.path} --context N",
            )
        generation.max_new_tokens = min(generation.max_new_tokens, room)
        self._waiting.append(generation)

    def cancel(self, generation: Generation | None = None) -> None:
        """Forget a generation wherever it is; without one, all that wait for a slot."""
        if generation is None:
            self._waiting.clear()
        elif generation in self._waiting:
            self._waiting.remove(generation)
        for slot in self._slots:
            if generation is not None and slot.generation is generation:
                if slot in self._prefilling:
                    self._prefilling.remove(slot)
                slot.generation = slot.features = None

    def step(self) -> list[Generation]:
        """Do a share of the work. Returns the generations that it finished."""
        return [*self._admit(), *self._prefill(), *self._decode()]

    def run(self, generation: Generation) -> Iterator[int]:
        """Submit a generation and yield its token ids as they are made. Raises what went wrong with it."""
        self.submit(generation)
        told = 0
        try:
            while generation.finish_reason is None:
                self.step()
                yield from generation.token_ids[told:]
                told = len(generation.token_ids)
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise generation.error

    # Vision and admission

    def _admit(self) -> list[Generation]:
        """Give free slots to those that wait, and encode images ahead. Returns those whose images cannot be encoded."""
        failed = []
        free = [slot for slot in self._slots if slot.generation is None]
        while self._waiting and free:
            generation = self._waiting[0]
            if not all(key in self._features for key in generation.prompt.image_keys):
                failed += self._encode_next()
                continue
            self._waiting.popleft()
            # The slot that already holds most of the prompt; the lowest of equals, so that few idle slots decode along.
            slot = max(free, key=lambda slot: (slot.shared(generation.prompt.row_keys), -slot.index))
            free.remove(slot)
            slot.generation, slot.sampler = generation, Sampler(generation.sampling, generation.constraint)
            self._prefilling.append(slot)
        return failed + self._encode_next()

    def _encode_next(self) -> list[Generation]:
        """Encode the first image that waits for it, with others of its grid. Returns those for which it failed."""
        wanted: dict[bytes, Array] = {}
        owners: dict[Generation, None] = {}
        for generation in list(self._waiting)[: self.slots]:
            for key, image in zip(generation.prompt.image_keys, generation.prompt.images, strict=True):
                first = next(iter(wanted.values()), image)
                full = len(wanted) == self._vision_batch(first.shape)
                if key not in self._features and key not in wanted and image.shape == first.shape and not full:
                    wanted[key] = image
                    owners[generation] = None
        started = time.perf_counter()
        try:
            self._features |= self._encoded(wanted)
        except PixtralError as error:
            for generation in owners:
                generation.error, generation.finish_reason = error, "error"
                self._waiting.remove(generation)
            return list(owners)
        if owners:
            for times in (self.times, *(generation.times for generation in owners)):
                times.vision_ms += _ms_since(started)
        self._forget_features()
        return []

    def _encoded(self, images: dict[bytes, Array]) -> dict[bytes, Array]:
        """Features of images of one grid, from the disk where they are kept there."""
        found = {key: self._disk.get(key) for key in images} if self._disk is not None else {}
        features = {key: value for key, value in found.items() if value is not None}
        missing = {key: image for key, image in images.items() if key not in features}
        if missing:
            features |= zip(missing, self._runner.encode(list(missing.values())), strict=True)
            if self._disk is not None:
                for key in missing:
                    self._disk.put(key, features[key])
        return features

    def _vision_batch(self, shape: tuple[int, ...]) -> int:
        """Images of a shape that are encoded together: large ones, whose attention takes the memory, one by one."""
        half = self._bundle.limits.max_image_side // 2
        return self.slots if max(shape[1:]) <= half else 1

    def _forget_features(self) -> None:
        """Keep what waits, and what was used last: another question about the same image may follow."""
        needed = {key for generation in self._waiting for key in generation.prompt.image_keys}
        needed |= {key for slot in self._slots if slot.generation for key in slot.generation.prompt.image_keys}
        spare = [key for key in self._features if key not in needed]
        for key in spare[: max(0, len(spare) - self.slots)]:
            del self._features[key]

    # Prefill

    def _prefill(self) -> list[Generation]:
        """Read chunks of prompts, first come first served. Returns generations that ended with their first token."""
        finished = []
        while self._prefilling:
            slot = self._prefilling[0]
            assert slot.generation is not None
            prompt, length = slot.generation.prompt, len(slot.generation.prompt.token_ids)
            started = time.perf_counter()
            if slot.features is None:
                slot.features = self._begin(slot, prompt)
            view = self._rows(length + 1).view(slot.index, slot.index + 1)
            logits = self._runner.prefill_chunk(prompt, slot.features, view, slot.filled)
            slot.filled = min(slot.filled + self._runner.sessions.chunk, length)
            for times in (self.times, slot.generation.times):
                times.prefill_ms += _ms_since(started)
            if slot.filled == length:
                self._prefilling.popleft()
                slot.features = None
                finished += self._choose(slot, logits, [])
            taken = [slot for slot in self._slots if slot.generation]
            if 2 * sum(slot.running for slot in taken) >= len(taken):
                break
        return finished

    def _begin(self, slot: _Slot, prompt: Prompt) -> Array:
        """Give a slot the rows of its prompt that some slot has already. Returns the features of its images, (F, D)."""
        self._shrink()
        cache = self._rows(len(prompt.token_ids) + 1)
        keys, most = prompt.row_keys, len(prompt.token_ids) - 1  # the last token is always read, for its logits
        start = min(slot.shared(keys), most)
        other = max(self._slots, key=lambda other: other.shared(keys))
        if (there := min(other.shared(keys), most)) >= start + LEAST_COPIED_ROWS:
            cache.copy_rows(other.index, slot.index, there)
            start = there
        slot.keys[: len(keys)] = keys
        slot.filled = start
        assert slot.generation is not None
        slot.generation.reused_tokens = start
        features = [self._features[key] for key in prompt.image_keys]
        return np.concatenate(features) if features else self._runner.no_features

    # Decode

    def _decode(self) -> list[Generation]:
        """One step for every running answer. Returns the generations that it finished."""
        running = [slot for slot in self._slots if slot.running]
        if not running:
            return []
        started = time.perf_counter()
        drafts = {slot.index: self._draft(slot) for slot in running}
        last = running[-1].index + 1
        width = 1 + max(map(len, drafts.values()))
        token_ids = np.zeros((last, width), np.int64)
        for slot in running:
            assert slot.generation is not None
            tokens = [slot.generation.token_ids[-1], *drafts[slot.index]]
            token_ids[slot.index, : len(tokens)] = tokens
        cache = self._rows(max(slot.filled for slot in self._slots if slot.generation) + width)
        for slot in self._slots[:last]:  # free slots lose the rows that are written to
            slot.filled = min(slot.filled, cache.rows - width)
        starts = np.array([slot.filled for slot in self._slots[:last]])
        spans = [(slot.index * width, 1 + len(drafts[slot.index])) for slot in running]
        wanted = np.concatenate([np.arange(first, first + count) for first, count in spans])
        logits = self._runner.decode_slots(token_ids, starts, wanted, cache.view(0, last))
        generations = [slot.generation for slot in running if slot.generation]
        for times in (self.times, *(generation.times for generation in generations)):
            times.decode_ms += _ms_since(started)
            times.decode_steps += 1
        finished, row = [], 0
        for slot, (_, count) in zip(running, spans, strict=True):
            finished += self._choose(slot, logits[row : row + count], drafts[slot.index])
            row += count
        return finished

    def _choose(self, slot: _Slot, logits: npt.NDArray[np.float32], draft: list[int]) -> list[Generation]:
        """Take the next tokens: one for the first row of logits, and one more for each drafted token that was right.

        Returns the generation where that was its last token.
        """
        generation, sampler = slot.generation, slot.sampler
        assert generation is not None
        assert sampler is not None
        if generation.token_ids:  # the token that was read in this step has its row now
            slot.keys[slot.filled] = generation.token_ids[-1]
            slot.filled += 1
        for row, drafted in zip(logits, [*draft, None], strict=True):
            try:
                token = sampler(row)
            except PixtralError as error:
                generation.error, generation.finish_reason = error, "error"
                break
            generation.token_ids.append(token)
            if token == self._bundle.model.eos or (
                generation.constraint is not None and generation.constraint.is_complete
            ):
                generation.finish_reason = "stop"
            elif len(generation.token_ids) == generation.max_new_tokens:
                generation.finish_reason = "length"
            if generation.finish_reason or token != drafted:
                break
            slot.keys[slot.filled] = token
            slot.filled += 1
        if generation.finish_reason is None:
            return []
        slot.generation = slot.sampler = None
        return [generation]

    def _draft(self, slot: _Slot) -> list[int]:
        """The tokens that followed the last place where the newest tokens stood before."""
        generation = slot.generation
        assert generation is not None
        room = min(self._drafts, generation.max_new_tokens - len(generation.token_ids) - 1, self._room())
        if room < 1:
            return []
        tokens = np.concatenate([generation.prompt.token_ids, np.array(generation.token_ids, np.int64)])
        if len(tokens) <= NGRAM_TOKENS:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], NGRAM_TOKENS)
        places = np.flatnonzero((windows == tokens[-NGRAM_TOKENS:]).all(axis=1))
        if not len(places):
            return []
        after = int(places[-1]) + NGRAM_TOKENS
        return [int(token) for token in tokens[after : after + room]]

    def _room(self) -> int:
        """Rows that every taken slot has left beyond the next token."""
        return self._context - 1 - max(slot.filled for slot in self._slots if slot.generation)

    # The cache

    def _rows(self, rows: int) -> KVCache:
        if self._cache is None:
            self._cache = self._runner.sessions.decoder.new_cache(self.slots, rows)
        self._cache.reserve(rows)
        return self._cache

    def _shrink(self) -> None:
        """Give back rows that no generation needs, where they are more than half: attention reads all of them."""
        generations = [slot.generation for slot in self._slots if slot.generation]
        needed = max(len(generation.prompt.token_ids) + len(generation.token_ids) for generation in generations) + 1
        if self._cache is not None and 2 * needed < self._cache.rows:
            self._cache.shrink(needed)
            for slot in self._slots:
                slot.filled = min(slot.filled, self._cache.rows)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
