"""Continuous batching: many requests share one cache, a slot each, and a slot that is done is filled again at once.

A step encodes images that will be wanted, reads a chunk of a prompt and decodes one token for every running answer:

    submit ─▶ waiting ─vision─▶ waiting, encoded ─admit─▶ slot: prefill, chunk by chunk ─▶ slot: decode ─▶ finished

- Vision runs ahead: the next requests are encoded before a slot is free, images of one patch grid together, an image
  that several requests show once (`image_features`).
- Prefill runs slot by slot. While fewer than half of the taken slots decode, chunks go one after the other; from then
  on there is one chunk a step, so that running answers never wait for more.
- Rows that a slot holds already are not computed again: before a prompt is read, the longest beginning that it shares
  with any slot's rows is copied (system prompt; the same image, asked something else; the turns before; `slots`).
- Drafts: where an answer's last tokens stood before, the tokens that followed there are tried in the same step
  (`drafts`). Each is kept only if it is the token that would have been chosen anyway.

Free slots below a running one are decoded along, onto a row that nothing reads before it is written again.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterator

import numpy as np

from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import ContextError, MemoryShortageError, Option
from pixtral_runtime.generation.drafts import look_up
from pixtral_runtime.generation.feature_cache import FeatureCache
from pixtral_runtime.generation.generation import Generation, StageTimes, milliseconds_since
from pixtral_runtime.generation.image_features import ImageFeatures
from pixtral_runtime.generation.model_runner import Features, ModelRunner
from pixtral_runtime.generation.sampling import Sampler
from pixtral_runtime.generation.slots import RunningSlot, SlotCache


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
        context: int | None = None,
    ) -> None:
        """`context` is the most tokens of a prompt and its answer, None for as many as the bundle takes."""
        self._bundle, self._runner = bundle, runner
        limits = (bundle.limits.max_context, runner.sessions.context, context)
        self._context = min(limit for limit in limits if limit is not None)
        self._drafts = drafts if runner.sessions.drafts else 0
        self._waiting: deque[Generation] = deque()
        self._prefilling: deque[RunningSlot] = deque()
        self._decoding: list[RunningSlot] = []  # by slot
        self._features = ImageFeatures(runner, bundle.limits.max_image_side, slots, features)
        self._cache = SlotCache(runner.sessions.decoder, slots, self._context)
        self.times = StageTimes()

    @property
    def slots(self) -> int:
        return len(self._cache.slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Generations that have a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def context(self) -> int:
        return self._context

    @property
    def cache_usage(self) -> float:
        """The share of all slots' rows that running generations hold."""
        return sum(running.slot.filled for running in self._running) / (self.slots * self._context)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def _running(self) -> list[RunningSlot]:
        return [*self._prefilling, *self._decoding]

    def submit(self, generation: Generation) -> None:
        """Queue one; its answer is cut where the context ends. Raises ContextError where the prompt does not fit."""
        room = self._context - len(generation.prompt.token_ids)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(generation.prompt.token_ids)} tokens, the cache {self._context} rows a slot",
                Option("image_tokens", "N", "for smaller images"),
                f"pixtral build {self._bundle.path} --context {len(generation.prompt.token_ids) + 1}",
            )
        generation.max_new_tokens = min(generation.max_new_tokens, room)
        self._waiting.append(generation)

    def cancel(self, generation: Generation | None = None) -> None:
        """Forget a generation wherever it is; without one, all that wait for a slot."""
        if generation is None:
            self._waiting.clear()
            return
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._prefilling = deque(running for running in self._prefilling if running.generation is not generation)
        self._decoding = [running for running in self._decoding if running.generation is not generation]

    def step(self) -> list[Generation]:
        """Do a share of the work. Returns the generations that it finished.

        Where memory runs out, half of the slots are given up and the answers under way begin again.
        """
        finished: list[Generation] = []
        try:
            for part in (self._admit, self._prefill, self._decode):
                for generation in part():  # one by one: what is finished before memory runs out is not lost
                    finished.append(generation)
        except MemoryShortageError as error:
            finished += self._give_slots_up(error)
        return finished

    def run(self, generation: Generation) -> Iterator[int]:
        """Submit a generation and yield its token ids as they are made, until it is done or cancelled.

        Raises what went wrong with it.
        """
        self.submit(generation)
        told = 0
        try:
            while generation.finish_reason is None and not generation.is_cancelled:
                self.step()
                yield from generation.token_ids[told:]
                told = len(generation.token_ids)
        except KeyboardInterrupt:  # amid a step, perhaps while the cache grew
            self._cache.forget()
            raise
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise generation.error

    def _give_slots_up(self, error: MemoryShortageError) -> list[Generation]:
        """Go on with half of the slots and a new cache. Returns the generations for which that is no way out."""
        running = sorted(self._running, key=lambda running: running.slot.index)
        self._prefilling.clear()
        self._decoding.clear()
        lost = [one.generation for one in running if self.slots == 1 or one.generation.constraint is not None]
        for generation in lost:  # a constraint cannot begin again
            generation.fail(error)
        again = [one.generation for one in running if one.generation not in lost]
        for generation in again:
            generation.begin_again()
        self._waiting.extendleft(reversed(again))
        self._cache = SlotCache(self._runner.sessions.decoder, max(1, self.slots // 2), self._context)
        return lost

    # Vision and admission

    def _admit(self) -> list[Generation]:
        """Give free slots to those that wait, and encode images ahead. Returns those whose images cannot be encoded."""
        failed = []
        taken = [running.slot for running in self._running]
        free = [slot for slot in self._cache.slots if slot not in taken]
        while self._waiting and free and not self._waiting[0].is_cancelled:
            generation = self._waiting[0]
            if not self._features.has(generation.prompt):
                failed += self._encode_ahead()
                continue
            self._waiting.popleft()
            # The slot that already holds most of the prompt; the lowest of equals, so that few idle slots decode along.
            slot = max(free, key=lambda slot: (slot.shared(generation.prompt.row_keys), -slot.index))
            free.remove(slot)
            sampler = Sampler(generation.sampling, generation.constraint, generation.logit_bias)
            self._prefilling.append(RunningSlot(slot, generation, sampler))
        return failed + self._encode_ahead()

    def _encode_ahead(self) -> list[Generation]:
        """Encode images of the next requests. Returns those for which it failed."""
        soon = [generation for generation in list(self._waiting)[: self.slots] if not generation.is_cancelled]
        failed = self._features.encode_next(soon, self.times)
        for generation in failed:
            self._waiting.remove(generation)
        if not failed:
            generations = (*self._waiting, *(running.generation for running in self._running))
            self._features.forget(generation.prompt for generation in generations)
        return failed

    # Prefill

    def _prefill(self) -> Iterator[Generation]:
        """Read chunks of prompts, first come first served. Yields generations that ended with their first token."""
        while self._prefilling and not self._prefilling[0].generation.is_cancelled:
            running = self._prefilling[0]
            slot, generation = running.slot, running.generation
            length = len(generation.prompt.token_ids)
            started = time.perf_counter()
            if running.features is None:
                running.features = self._begin(running)
            view = self._cache.reserve(length + 1).view(slot.index, slot.index + 1)
            logits = self._runner.prefill_chunk(
                generation.prompt, running.features, view, slot.filled, temperature=generation.sampling.temperature
            )
            slot.filled = min(slot.filled + self._runner.sessions.chunk, length)
            rows = list(logits) if slot.filled == length else []  # nothing waits for a chunk before the last
            for times in (self.times, generation.times):
                times.prefill_ms += milliseconds_since(started)
            if slot.filled == length:
                self._prefilling.popleft()
                running.features = None
                if running.choose(rows, [], self._bundle.model.eos):
                    yield generation
                else:
                    insort(self._decoding, running, key=lambda running: running.slot.index)
            del logits, rows  # the next chunk's may lie where these do
            if len(self._decoding) >= len(self._prefilling):
                break

    def _begin(self, running: RunningSlot) -> Features:
        """Give a slot the rows of its prompt that are there already. Returns the features of its images, (F, D)."""
        generations = [running.generation for running in self._running]
        self._cache.shrink(1 + max(len(one.prompt.token_ids) + len(one.token_ids) for one in generations))
        running.generation.reused_tokens = self._cache.begin(running.slot, running.generation.prompt)
        return self._features.of(running.generation.prompt)

    # Decode

    def _decode(self) -> list[Generation]:
        """One step for every running answer. Returns the generations that it finished."""
        decoding = list(self._decoding)
        if not decoding:
            return []
        started = time.perf_counter()
        drafts = [self._draft(running) for running in decoding]
        last = decoding[-1].slot.index + 1
        if self._runner.sessions.replays:
            last = min(1 << (last - 1).bit_length(), self.slots)
        width = 1 + max(map(len, drafts))
        token_ids, wanted, temperatures = np.zeros((last, width), np.int64), list[int](), list[float]()
        for running, draft in zip(decoding, drafts, strict=True):
            index, count = running.slot.index, 1 + len(draft)
            token_ids[index, :count] = [running.generation.token_ids[-1], *draft]
            wanted += range(index * width, index * width + count)
            temperatures += [running.generation.sampling.temperature] * count
        if self._runner.sessions.replays:  # a shape less; nobody reads these rows
            missing = max(0, last - len(wanted))
            wanted, temperatures = wanted + [0] * missing, temperatures + [0] * missing
        cache = self._cache.reserve(self._most_filled() + width)
        for slot in self._cache.slots[:last]:  # free slots lose the rows that are written to
            slot.filled = min(slot.filled, cache.rows - width)
        starts = np.array([slot.filled for slot in self._cache.slots[:last]])
        view = cache.view(0, last)
        rows = list(self._runner.decode_slots(token_ids, starts, np.array(wanted), view, np.array(temperatures)))
        for times in (self.times, *(running.generation.times for running in decoding)):
            times.decode_ms += milliseconds_since(started)
            times.decode_steps += 1
        finished, row = [], 0
        for running, draft in zip(decoding, drafts, strict=True):
            if running.choose(rows[row : row + 1 + len(draft)], draft, self._bundle.model.eos):
                self._decoding.remove(running)
                finished.append(running.generation)
            row += 1 + len(draft)
        return finished

    def _draft(self, running: RunningSlot) -> list[int]:
        """Tokens to try after an answer's newest one: no more than the answer and the rows of every slot have room."""
        generation = running.generation
        left = generation.max_new_tokens - len(generation.token_ids) - 1
        room = min(self._drafts, left, self._context - 1 - self._most_filled())
        if room < 1:
            return []
        return look_up(np.concatenate([generation.prompt.token_ids, np.array(generation.token_ids, np.int64)]), room)

    def _most_filled(self) -> int:
        """Rows of the taken slot that has most."""
        return max(running.slot.filled for running in self._running)
