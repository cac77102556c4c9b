"""Stages of the device check for speed: Pixtral-12B's shapes with random weights, through the project's own backend."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from device_compare import LARGE_CASES, compare_decoder, device
from device_results import NEW_TOKENS, TEXT_TOKENS, emit, median_ms, reported, time_left
from device_slots import short_of_memory, slots_alike
from device_weights import weighted
from pixtral_runtime.backends.ort_cuda import CudaSettings, OrtCudaSession, open_cuda_sessions
from pixtral_runtime.backends.session import GraphUse, Sessions
from pixtral_runtime.bench.measure import Endless
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.device.energy import measure_energy
from pixtral_runtime.device.energy_meters import open_meters
from pixtral_runtime.device.nvml import open_gpu
from pixtral_runtime.errors import MachineError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.sampling import Sampler, Sampling
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.inputs.prompt import Prompt

GREEDY, ONE_SLOT = Sampling(), CudaSettings()
STEPS, MOST_S = 60, 1.0  # of a measurement, whichever ends first
WARM_STEPS = 6  # a CUDA graph is recorded within
COHORTS = 2  # as many requests as there are slots, measured; one more comes before

# What a step takes in milliseconds, written before it was measured, by slots and rows of each.
INT4_STEPS = {
    (1, 256): "4.5",
    (1, 2048): "4.5",
    (1, 4864): "4.8",
    (8, 2048): "11",
    (16, 2048): "21",
    (32, 2048): "18",
}
FLOAT16_STEPS = {(1, 2048): "7.9", (16, 2048): "9.3", (32, 2048): "10.9"}
MANY_SLOTS_STEPS = {(1, 2048): "5.8", (8, 2048): "7.5", (16, 2048): "8.2", (32, 2048): "10.5"}


# Stages


def int4() -> None:
    with weighted("int4") as bundle:
        sessions = opened("int4", bundle)
        for slots in (1, 16):  # first: a step that was recorded is replayed
            without_graphs("int4", bundle, sessions, slots, 2048)
        for (slots, filled), expected in INT4_STEPS.items():
            decode("int4", bundle, sessions, slots, filled, expected=expected)
        for slots in (1, 16):
            decode("int4 drawn at 0.7", bundle, sessions, slots, 2048, sampling=Sampling(0.7), most_s=0.5)
        prefill("int4", bundle, sessions, expected="200")
        energy_of_steps("int4", bundle, sessions, 1)
        requests("int4", bundle, sessions, 32, expected="6 to 7")
        requests("int4", bundle, sessions, 16, expected="4 to 6")
        slots_alike("int4", bundle, sessions)
        short_of_memory("int4", bundle, sessions)
        with reported("int4 masked"):
            form = OrtCudaSession(bundle, "decoder", device(), CudaSettings(by_length=False))
            masked = replace(sessions, decoder=form)
            for filled, expected in ((2048, "7.4"), (4864, "11 to 15")):
                decode("int4 masked", bundle, masked, 1, filled, expected=expected)


def float16() -> None:
    with weighted("float16") as bundle:
        sessions = opened("float16", bundle)
        for (slots, filled), expected in FLOAT16_STEPS.items():
            decode("float16", bundle, sessions, slots, filled, expected=expected)
        decode("float16 drawn at 0.7", bundle, sessions, 16, 2048, sampling=Sampling(0.7), most_s=0.5)
        prefill("float16", bundle, sessions, expected="170")
        vision("float16", bundle, sessions)
        for slots, expected in ((32, "10"), (16, "8")):
            requests("float16", bundle, sessions, slots, expected=expected)
        requests("float16", bundle, sessions, 1, expected="0.8")


def int4_for_many_slots() -> None:
    _int4("int4", "widths-int4", many_slots=True)


def int4_in_groups_of_32() -> None:
    _int4("int4-32", "widths-int4-32", many_slots=False)


def int4_in_groups_of_32_for_many_slots() -> None:
    _int4("int4-32", "widths-int4-32", many_slots=True)


def _int4(large: str, narrow: str, *, many_slots: bool) -> None:
    name = f"{large}, many slots" if many_slots else large
    with reported(f"{name} widths"), weighted(narrow) as bundle:
        compare_decoder(name, bundle, {"by length": CudaSettings(many_slots=many_slots)}, LARGE_CASES[1:6])
    with weighted(large) as bundle:
        sessions = opened(name, bundle, CudaSettings(many_slots=many_slots))
        for (slots, filled), expected in MANY_SLOTS_STEPS.items():
            decode(name, bundle, sessions, slots, filled, expected=expected if many_slots else "")
        prefill(name, bundle, sessions, expected="330" if many_slots else "225")
        for slots in (32, 16):
            requests(name, bundle, sessions, slots, expected="7.5" if many_slots else "6.5")


# Measurements


@dataclass
class Watched:
    """A session that notes how long each of its runs kept the host, in seconds; of one that is kept, the feeds."""

    session: Any
    spent: list[float] = field(default_factory=list)
    keeps: bool = False
    kept: tuple[Any, ...] = ()

    def run(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        outputs = self.session.run(*arguments)
        self.spent.append(time.perf_counter() - started)
        if (
            self.keeps
        ):  # not always: memory that is held is not written to again, and steps over other memory are others
            self.kept = arguments
        return outputs

    def again(self) -> None:
        """The kept run, until the device is done."""
        self.session.run(*self.kept)
        device().wait()

    def new_cache(self, slots: int, rows: int) -> Any:
        return self.session.new_cache(slots, rows)


def opened(name: str, bundle: Bundle, settings: CudaSettings = ONE_SLOT) -> Sessions:
    started = time.perf_counter()
    sessions = open_cuda_sessions(bundle, device(), settings)
    emit(f"{name}: load", round(time.perf_counter() - started, 1), "s", expected="< 20", gpu_bytes=gpu_bytes())
    return sessions


def gpu_bytes() -> int | None:
    """Memory in use on the GPU, by whomever; None without NVML."""
    try:
        return getattr(open_gpu().read("MemoryInfo"), "used", None)
    except MachineError:
        return None


def stepper(
    bundle: Bundle, sessions: Sessions, slots: int, filled: int, sampling: Sampling = GREEDY
) -> Callable[[], tuple[float, float]]:
    """A call that decodes a token in each slot as the scheduler does, at the end of `filled` rows.

    It returns when the step began to choose tokens and when it was done.
    """
    runner, past = ModelRunner(bundle, sessions), sessions.decoder.new_cache(slots, filled)
    samplers = [Sampler(replace(sampling, seed=slot)) for slot in range(slots)]
    tokens = np.arange(100, 100 + slots)[:, None]
    starts, wanted = np.full(slots, filled - STEPS - WARM_STEPS - 1), np.arange(slots)
    temperatures = np.full(slots, sampling.temperature)

    def step() -> tuple[float, float]:
        rows = list(runner.decode_slots(tokens, starts, wanted, past, temperatures))
        choosing = time.perf_counter()
        tokens[:, 0] = [choose(row) for choose, row in zip(samplers, rows, strict=True)]
        starts[:] = np.minimum(starts + 1, filled - 1)
        return choosing, time.perf_counter()

    return step


def decode(
    name: str, bundle: Bundle, sessions: Sessions, slots: int, filled: int, *, expected: str = "",
    sampling: Sampling = GREEDY, most_s: float = MOST_S,
) -> None:  # fmt: skip
    """Report a step's time and what of it the host needs: to queue both graphs, to wait, to choose tokens."""
    figure = f"{name} {slots} × {filled:,}"
    if time_left() < 4:
        return emit(figure, "no time left")
    with reported(figure):
        embed, decoder = Watched(sessions.embed), Watched(sessions.decoder)
        step = stepper(bundle, replace(sessions, embed=embed, decoder=decoder), slots, filled, sampling)
        for _ in range(WARM_STEPS):
            step()
        times: dict[str, list[float]] = {"step": [], "queue": [], "queue_embed": [], "choose": []}
        began = time.perf_counter()
        while len(times["step"]) < STEPS and time.perf_counter() - began < most_s:
            started = time.perf_counter()
            choosing, done = step()
            times["step"].append(done - started)
            times["queue"].append(decoder.spent[-1])
            times["queue_embed"].append(embed.spent[-1])
            times["choose"].append(done - choosing)
        embed.keeps = decoder.keeps = True
        step()
        alone = {
            "embed_alone": median_ms(embed.again, 20, 4, 0.2),
            "decoder_alone": median_ms(decoder.again, 20, 4, 0.3),
        }
        ms = {part: round(1e3 * median(values), 3) for part, values in times.items()}
        per_s = round(1e3 * slots / ms["step"], 1)
        emit(figure, ms.pop("step"), "ms", expected=expected, tokens_per_s=per_s, **ms, **alone, gpu_bytes=gpu_bytes())


def without_graphs(name: str, bundle: Bundle, sessions: Sessions, slots: int, filled: int) -> None:
    """The same step, every kernel launched by the host."""
    graphs: tuple[Any, ...] = (sessions.embed, sessions.decoder)
    kept = [(session, session.graph_use) for session in graphs]
    try:
        for session in graphs:
            session.graph_use = GraphUse("off")
        decode(f"{name}, no CUDA graph,", bundle, sessions, slots, filled, most_s=0.5)
    finally:
        for session, use in kept:
            session.graph_use = use


def prefill(name: str, bundle: Bundle, sessions: Sessions, *, tokens: int = 4160, expected: str = "") -> None:
    """All tokens of a picture of 1,024² pixels into an empty slot, until the first token can be chosen."""
    figure = f"{name} prefill {tokens:,}"
    with reported(figure):
        runner, past = ModelRunner(bundle, sessions), sessions.decoder.new_cache(1, tokens + 1)
        # Rows of 64 patches, a break after each.
        index = np.where(np.arange(tokens) % 65 < 64, np.arange(tokens) - np.arange(tokens) // 65, -1)
        random = np.random.default_rng(0)
        features = random.standard_normal((int(index.max()) + 1, bundle.model.decoder.dim)).astype(bundle.dtype)
        prompt = Prompt(np.full(tokens, bundle.model.image_tokens.image), index, (), tokens)

        def run() -> None:
            for start in range(0, tokens, sessions.chunk):
                logits = runner.prefill_chunk(prompt, features, past, start)
                if start + sessions.chunk >= tokens:
                    Sampler(GREEDY)(next(iter(logits)))
                del logits

        milliseconds = median_ms(run, 5, 1, 2.0)
        emit(figure, milliseconds, "ms", expected=expected, tokens_per_s=round(1e3 * tokens / milliseconds))


def vision(name: str, bundle: Bundle, sessions: Sessions) -> None:
    """Features of pictures, on the host at the end."""
    for pictures, side, expected in ((1, 512, "10"), (1, 1024, "40"), (4, 512, "")):
        figure = f"{name} vision {pictures} × {side}²"
        with reported(figure):
            runner = ModelRunner(bundle, sessions)
            images = [np.random.default_rng(n).standard_normal((3, side, side), np.float32) for n in range(pictures)]
            emit(figure, median_ms(lambda: runner.encode(images), 10, 2, 1.0), "ms", expected=expected)  # noqa: B023
            pixels = {"pixels": np.stack(images).astype(bundle.dtype)}
            emit(f"{figure}, left there", median_ms(lambda: waited(sessions, pixels), 10, 2, 1.0), "ms")  # noqa: B023


def waited(sessions: Sessions, pixels: Mapping[str, npt.NDArray[Any]]) -> None:
    sessions.vision.run(pixels)
    device().wait()


def requests(name: str, bundle: Bundle, sessions: Sessions, slots: int, *, expected: str = "") -> None:
    """Whole requests through the scheduler, each with a picture of its own, from JPEG to the last token.

    Measured between two ends of requests, all slots taken throughout.
    """
    figure = f"{name} requests, {slots} slots"
    if time_left() < 8:
        return emit(figure, "no time left")
    with reported(figure), ThreadPoolExecutor(4) as pool:
        scheduler = Scheduler(bundle, ModelRunner(bundle, sessions), slots)
        numbers, wanted, done = count(), slots * COHORTS if slots > 1 else 3, 0
        prompts = [pool.submit(picture_prompt, bundle, next(numbers)) for _ in range(slots)]
        marks: list[tuple[float, int, tuple[float, ...]]] = []
        stop = time.perf_counter() + min(20.0, time_left() - 3)
        with measure_energy(open_meters()) as readings:
            began = time.perf_counter()
            while (not marks or done < marks[0][1] + wanted) and time.perf_counter() < stop:
                while scheduler.waiting < slots:  # others are read meanwhile
                    prompts.append(pool.submit(picture_prompt, bundle, next(numbers)))
                    prompt = prompts.pop(0).result()
                    scheduler.submit(Generation(prompt, NEW_TOKENS, constraint=Endless(bundle.model.eos)))
                if ended := scheduler.step():
                    done += len(ended)
                    if failed := [one.error for one in ended if one.error]:
                        raise failed[0]
                    times = scheduler.times
                    mark = (time.perf_counter(), done, (times.vision_ms, times.prefill_ms, times.decode_ms))
                    if done >= slots or marks:
                        marks.append(mark)
            whole = time.perf_counter() - began
        if len(marks) < 2:
            return emit(figure, f"{done} requests in {whole:.1f} s", "", expected=expected)
        (first, before, early), (last, after, late) = marks[0], marks[-1]
        rate, each = (after - before) / (last - first), 1 / (after - before)
        stages = [round((b - a) * each, 2) for a, b in zip(early, late, strict=True)]
        joules = {f"{one.scope}_joules_each": one.joules and round(one.joules / done, 1) for one in readings}
        emit(figure, round(rate, 3), "per s", expected=expected, tokens_per_s=round(rate * NEW_TOKENS, 1),
             requests=after - before, seconds=round(last - first, 2), prompt_tokens=len(prompt.token_ids),
             vision_prefill_decode_ms_each=stages, gpu_bytes=gpu_bytes(), **joules)  # fmt: skip


def picture_prompt(bundle: Bundle, number: int) -> Prompt:
    """A request about a JPEG of 480 × 360 pixels, each number another picture, and a few words."""
    random, special = np.random.default_rng(number), bundle.model.image_tokens
    file = io.BytesIO()
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
    coarse.resize((480, 360), Image.Resampling.BICUBIC).save(file, "JPEG")
    patch = bundle.model.vision.token_edge
    pixels = Preprocess(patch, bundle.limits.max_image_side)(Image.open(file).convert("RGB"))
    rows, columns = (side // patch for side in pixels.shape[1:])
    image = ([special.image] * columns + [special.image_break]) * rows
    image[-1] = special.image_end
    ids = np.array([bundle.model.bos, *image, *random.integers(100, 700, TEXT_TOKENS)])
    is_image = ids == special.image
    return Prompt(ids, np.where(is_image, is_image.cumsum() - 1, -1), (pixels,), len(image))


def energy_of_steps(name: str, bundle: Bundle, sessions: Sessions, slots: int) -> None:
    """Joules a token of two seconds of steps."""
    with reported(f"{name} energy"):
        step, tokens = stepper(bundle, sessions, slots, 2048), 0
        step()
        with measure_energy(open_meters()) as readings:
            began = time.perf_counter()
            while time.perf_counter() - began < 2:
                step()
                tokens += slots
        for reading in readings:
            each = reading.joules and round(reading.joules / tokens, 2)
            emit(f"{name} energy of {reading.scope}", each, "J/token", watts=reading.watts, reason=reading.reason)
