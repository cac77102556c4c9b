"""Slots at full depth: many in one step give what each gives alone, and work is finished where memory runs out."""

from __future__ import annotations

import numpy as np

from device_results import emit, reported, time_left
from pixtral_runtime.backends.cuda import Memory
from pixtral_runtime.backends.session import Sessions
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import MemoryShortageError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.prompt import Prompt

LEFT_BYTES = (8 << 30, 3 << 30)  # of the device's memory, for 32 slots of 2,048 rows, which need 10.7 GB
SLOTS, PROMPT_TOKENS, NEW_TOKENS = 32, 1500, 6


def slots_alike(name: str, bundle: Bundle, sessions: Sessions) -> None:
    """Slots filled to different lengths, decoded together (plain, then replayed) and one by one."""
    for slots in (2, 8, 16, 32):
        if time_left() < 5:
            return
        with reported(f"{name} {slots} slots alike"):
            runner, past = ModelRunner(bundle, sessions), sessions.decoder.new_cache(slots, 2048)
            lengths = np.array([5 + 331 * slot % 2000 for slot in range(slots)])
            random = np.random.default_rng(slots)
            for slot, length in enumerate(lengths):
                prompt = prompt_of(random, int(length))
                runner.prefill_chunk(prompt, runner.no_features, past.view(slot, slot + 1), 0)
            tokens, wanted = random.integers(100, 700, (slots, 1)), np.arange(slots)
            together = [runner.decode_slots(tokens, lengths, wanted, past).numpy() for _ in range(5)]
            errors, same = [], 0
            for slot in range(slots):
                own, view = slice(slot, slot + 1), past.view(slot, slot + 1)
                alone = runner.decode_slots(tokens[own], lengths[own], np.zeros(1, int), view).numpy()[0]
                errors.append(max(float(np.abs(step[slot] - alone).max() / np.abs(alone).max()) for step in together))
                same += int(together[-1][slot].argmax() == alone.argmax())
            emit(f"{name} {slots} slots alike", round(max(errors), 5), "rel", expected="< 0.02",
                 slots=[round(error, 5) for error in errors], argmax=f"{same} of {slots}")  # fmt: skip


def short_of_memory(name: str, bundle: Bundle, sessions: Sessions) -> None:
    """Requests for 32 slots where the device has room for fewer."""
    device = sessions.decoder._device  # type: ignore[attr-defined]
    for left in LEFT_BYTES:
        if time_left() < 12:
            return
        figure = f"{name} with {left >> 30} GB left"
        with reported(figure):
            ballast = Memory(device, device.free_bytes() - left)
            scheduler = Scheduler(bundle, ModelRunner(bundle, sessions), SLOTS)
            random = np.random.default_rng(0)
            asked = [Generation(prompt_of(random, PROMPT_TOKENS), NEW_TOKENS) for _ in range(SLOTS)]
            for generation in asked:
                scheduler.submit(generation)
            while scheduler.busy:
                scheduler.step()
            failed = [one.error for one in asked if one.error]
            emit(f"{figure}, answered", f"{SLOTS - len(failed)} of {SLOTS}", "", expected=f"{SLOTS} of {SLOTS}",
                 slots=scheduler.slots, other_errors=sum(not isinstance(one, MemoryShortageError) for one in failed),
                 first=str(failed[0]) if failed else "")  # fmt: skip
            del ballast, scheduler


def prompt_of(random: np.random.Generator, tokens: int) -> Prompt:
    """Words only."""
    return Prompt(random.integers(100, 700, tokens), np.full(tokens, -1), (), 0)
