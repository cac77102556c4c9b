"""How long each stage takes on this machine, for requests of a given size: the measuring loops of `pixtral bench`.

Latency: the same request (or batch of requests) over and over, stage by stage, after a warm-up:

    image ─▶ preprocess ─▶ vision ─▶ prefill ─▶ first token (ttft) ─▶ steps (tpot: mean of a run) ─▶ e2e

Nothing is reused between runs, and no answer ends early. Throughput: a whole job with each number of slots. Serve:
requests arrive at random at a given rate, and each one's waiting counts.

Times are milliseconds. A batch's ttft is when the last of its requests has its first token.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.bench.cases import (
    LATENCY_STAGES,
    SERVED_REQUESTS,
    THROUGHPUT_STAGES,
    Case,
    CaseResult,
    DeviceRates,
    Effort,
    poisson_arrivals,
)
from pixtral_runtime.bench.roofline import Ceiling, Cost, Sizes, ceiling, stage_costs
from pixtral_runtime.device import memory as bench_memory
from pixtral_runtime.device.energy import Energy, measure_energy
from pixtral_runtime.device.energy_meters import open_meters
from pixtral_runtime.errors import ContextError, Option, SettingError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.model_runner import Features
from pixtral_runtime.generation.sampling import Sampler, Sampling
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import read_image_file
from pixtral_runtime.inputs.prompt import Prompt

BENCH_QUESTION = "Describe this image in one short sentence."


class Endless:
    """A constraint that forbids the end, so that answers have the length that was asked for."""

    is_complete = False

    def __init__(self, eos: int) -> None:
        self._eos = eos

    def constraint(self) -> Endless:
        return self

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits = logits.copy()
        logits[self._eos] = -np.inf
        return logits

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.not_equal(ids, self._eos)

    def accept(self, token_id: int) -> None:
        pass


def pictures(case: Case, folder: Sequence[Path], count: int, seed: int = 0) -> list[bytes]:
    """Files as they would be read: the user's in turn, or made-up JPEGs of the case's side, from `seed` on."""
    if case.image_side is None:
        return [read_image_file(folder[number % len(folder)]) for number in range(seed, seed + count)]
    made = []
    for number in range(seed, seed + count):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        file = io.BytesIO()
        size = (case.image_side, case.image_side)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def measure_latency(
    model: Model, case: Case, effort: Effort, rates: DeviceRates | None, folder: Sequence[Path] = ()
) -> CaseResult:
    """Measure a case stage by stage. Raises InputError where its request does not fit."""
    count = case.batch if case.image_side else max(case.batch, len(folder))
    files = pictures(case, folder, count)
    runs: list[dict[str, list[float]]] = []
    prompt = _prompt(model, case, files[0])
    _check_room(model, case, prompt)
    cache = model.runner.sessions.decoder.new_cache(case.batch, len(prompt.token_ids) + case.decode_tokens + 1)

    def run() -> dict[str, list[float]]:
        first = len(runs) * case.batch
        return _run(model, case, [files[(first + slot) % count] for slot in range(case.batch)], cache)

    bench_memory.begin_peak()
    for _ in range(effort.warmup):
        run()
    begun = time.perf_counter()
    with measure_energy(open_meters()) as energies:
        while len(runs) < effort.runs or time.perf_counter() - begun < effort.min_seconds:
            runs.append(run())
    samples = {name: [value for run in runs for value in run[name]] for name in (*LATENCY_STAGES, "step")}
    tokens = {"prompt": len(prompt.token_ids), "image": prompt.image_tokens, "new": case.decode_tokens}
    result = CaseResult(case, samples, tokens, energy=[_energy(energy, case, len(runs)) for energy in energies])
    result.memory = bench_memory.memory_use()
    if case.image_side:
        costs = _costs(model, case, prompt)
        result.costs = {stage: {"flops": cost.flops, "bytes": cost.bytes} for stage, cost in costs.items()}
        for stage, best in {} if rates is None else _ceilings(costs, rates).items():
            result.ceilings_ms[stage], result.bound_by[stage] = best.seconds * 1e3, best.bound_by
    return result


def measure_throughput(
    model: Model, case: Case, effort: Effort, folder: Sequence[Path] = (), *, requests: int = 16
) -> CaseResult:
    """Requests and tokens a second of `requests` at once in the case's slots. Reading images is part of it.

    Vision, prefill and decode are milliseconds a request: what a run spent on them over its requests.
    """
    files = pictures(case, folder, requests)
    samples: dict[str, list[float]] = {name: [] for name in THROUGHPUT_STAGES}
    for number in range(effort.warmup + effort.runs):
        started = time.perf_counter()
        scheduler = Scheduler(model.bundle, model.runner, case.batch)
        for data in files:
            scheduler.submit(_generation(model, case, _prompt(model, case, data)))
        while scheduler.busy:
            scheduler.step()
        seconds = time.perf_counter() - started
        if number >= effort.warmup:
            times = scheduler.times
            stages_ms = (times.vision_ms / requests, times.prefill_ms / requests, times.decode_ms / requests)
            rates = (requests / seconds, requests * case.decode_tokens / seconds)
            for name, value in zip(THROUGHPUT_STAGES, (*rates, *stages_ms), strict=True):
                samples[name].append(value)
    return CaseResult(case, samples)


def measure_serving(
    model: Model, case: Case, folder: Sequence[Path] = (), *, requests: int = SERVED_REQUESTS
) -> CaseResult:
    """Requests that arrive as a Poisson process of the case's rate: what each waits for, its own time in line included.

    Images are decoded when they arrive.
    """
    assert case.rate
    files = pictures(case, folder, requests)
    arrivals, offered = poisson_arrivals(case.rate, requests)
    scheduler = Scheduler(model.bundle, model.runner, case.batch)
    scheduler.submit(
        _generation(model, case, _prompt(model, case, files[-1]))
    )  # the first request pays for all that is cold
    while scheduler.busy:
        scheduler.step()
    arrived: dict[Generation, float] = {}
    samples: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2e": []}
    first: dict[Generation, float] = {}
    begun = time.perf_counter()
    while len(samples["e2e"]) < requests:
        now = time.perf_counter() - begun
        while arrivals and arrivals[0] <= now:
            generation = _generation(model, case, _prompt(model, case, files[len(arrived)]))
            arrived[generation] = arrivals.pop(0)
            scheduler.submit(generation)
        if not scheduler.busy:
            time.sleep(max(0.0, arrivals[0] - (time.perf_counter() - begun)))
            continue
        finished = scheduler.step()
        now = time.perf_counter() - begun
        for generation in arrived:
            if generation.token_ids and generation not in first:
                first[generation] = now
        for generation in finished:
            samples["ttft"].append(1e3 * (first[generation] - arrived[generation]))
            samples["e2e"].append(1e3 * (now - arrived[generation]))
            samples["tpot"].append(1e3 * (now - first[generation]) / max(1, len(generation.token_ids) - 1))
    seconds = time.perf_counter() - begun
    samples["offered_per_s"] = [offered]
    samples["requests_per_s"] = [requests / seconds]
    samples["tokens_per_s"] = [requests * case.decode_tokens / seconds]
    return CaseResult(case, samples)


def _run(model: Model, case: Case, files: Sequence[bytes], cache: Any) -> dict[str, list[float]]:
    """One batch from files to tokens, each stage's time in milliseconds, and every step's."""
    runner, times = model.runner, dict[str, list[float]]()
    started = clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        times[name], clock = [(now - clock) * 1e3], now

    decoded = [decode_image(data, "image").pixels for data in files]
    lap("image")
    prompts = [_prompt(model, case, picture) for picture in decoded]
    lap("preprocess")
    features = list(_encode(model, prompts))
    lap("vision")
    cache.reserve(max(len(prompt.token_ids) for prompt in prompts) + case.decode_tokens + 1)
    choose, next_tokens = Sampler(Sampling(), Endless(model.bundle.model.eos)), []
    for slot, (prompt, encoded) in enumerate(zip(prompts, features, strict=True)):
        logits = runner.prefill(prompt, encoded, cache.view(slot, slot + 1))[-1]
        next_tokens.append(choose(logits))
    lap("prefill")
    times["ttft"] = [(clock - started) * 1e3]
    lengths, wanted = np.array([len(prompt.token_ids) for prompt in prompts]), np.arange(len(prompts))
    steps = []
    for step in range(case.decode_tokens - 1):
        tokens = np.array(next_tokens)[:, None]
        begun = time.perf_counter()
        logits = runner.decode_slots(tokens, lengths + step, wanted, cache)
        next_tokens = [choose(row) for row in logits]
        steps.append((time.perf_counter() - begun) * 1e3)
    times["step"] = steps
    times["tpot"] = [float(np.mean(steps))] if steps else []
    times["e2e"] = [(time.perf_counter() - started) * 1e3]
    return times


def _energy(energy: Energy, case: Case, runs: int) -> dict[str, Any]:
    """A meter's joules for a picture (all stages) and for a new token; None where it could not be read."""
    pictures = runs * case.batch
    each = None if energy.joules is None else energy.joules / pictures
    token = None if each is None else each / case.decode_tokens
    return asdict(energy) | {"joules_per_image": each, "joules_per_token": token}


def _encode(model: Model, prompts: Sequence[Prompt]) -> Iterator[Features]:
    """Features of each prompt's image: small ones of one grid together, as the scheduler does."""
    images = [prompt.images[0] for prompt in prompts]
    side = model.bundle.limits.max_image_side // 2
    if len({image.shape for image in images}) == 1 and max(images[0].shape[1:]) <= side:
        yield from model.runner.encode(images)
    else:
        for image in images:
            yield model.runner.encode([image])[0]


def _prompt(model: Model, case: Case, picture: bytes | Image.Image) -> Prompt:
    """A request about one picture, its text filled up to the case's number of tokens. Raises ContextError."""
    _check_length(model, case, case.prompt_tokens)
    pixels = decode_image(picture, "image").pixels if isinstance(picture, bytes) else picture
    prompt = model.prompts.build(user_message(BENCH_QUESTION, [pixels]))
    missing = case.prompt_tokens - (len(prompt.token_ids) - prompt.image_tokens)
    if missing <= 0:
        return prompt
    vocabulary = model.bundle.model.decoder.vocab_size
    extra = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, missing)  # ordinary tokens
    ids = np.concatenate([prompt.token_ids[:-1], extra, prompt.token_ids[-1:]])
    index = np.concatenate([prompt.feature_index[:-1], np.full(missing + 1, -1)])
    return Prompt(ids, index, prompt.images, prompt.image_tokens)


def _check_length(model: Model, case: Case, tokens: int) -> None:
    context = min(model.bundle.limits.max_context, model.runner.sessions.context or math.inf)
    if tokens + case.decode_tokens > context:
        raise ContextError(
            f"{case.name}: {tokens} tokens of prompt, and the context holds {context}",
            Option("image_side", "SMALLER"),
            Option("prompt_tokens", "SMALLER"),
            Option("decode_tokens", "SMALLER"),
        )


def _check_room(model: Model, case: Case, prompt: Prompt) -> None:
    _check_length(model, case, len(prompt.token_ids))
    slots = model.runner.sessions.slots
    if slots is not None and case.batch > slots:
        raise SettingError(f"{case.name}: the engines have {slots} slots", Option("batch", slots))


def _generation(model: Model, case: Case, prompt: Prompt) -> Generation:
    return Generation(prompt, case.decode_tokens, constraint=Endless(model.bundle.model.eos))


def _costs(model: Model, case: Case, prompt: Prompt) -> dict[str, Cost]:
    """What the stages cannot do without, for the whole batch: its prompts are prefilled one after the other."""
    length = len(prompt.token_ids)
    rows, columns = (side // model.bundle.model.vision.token_edge for side in prompt.images[0].shape[1:])
    costs = stage_costs(
        Sizes.of(model.bundle),
        grid=(rows, columns),
        prompt_tokens=length,
        context_rows=length + case.decode_tokens // 2,
        batch=case.batch,
    )
    return {"vision": costs["vision"], "prefill": costs["prefill"].times(case.batch), "decode": costs["decode"]}


def _ceilings(costs: Mapping[str, Cost], rates: DeviceRates) -> dict[str, Ceiling]:
    """The least time of the stages that have one, by the names of their samples."""
    bests = {
        stage: ceiling(cost, rates.bandwidth_bytes_per_s, rates.flops_per_s[stage], rates.attention_flops_per_s)
        for stage, cost in costs.items()
    }
    return {"vision": bests["vision"], "prefill": bests["prefill"], "tpot": bests["decode"]}
