"""What an example costs a setting, in seconds by batch size: seen in its records, timed, or predicted for a device.

A batch size changes no answer, so it is no setting of its own: a setting costs what it costs with the best of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pixtral_runtime.batch.records import Record, Request, Settings, record_key
from pixtral_runtime.batch.run import run_job
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bench.roofline import Sizes, ceiling, stage_costs
from pixtral_runtime.bundle.device_catalog import KnownDevice
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.tuning_measured import Measured
from pixtral_runtime.inputs.preprocess import Preprocess

TIMED = 8  # requests at least, and two batches
LEAST_SECONDS = 1.0  # a shorter run is repeated
MOST_RUNS = 3
PREDICTED_CONTEXT = 4096  # tokens that a device must have memory for

MADE = "records made by "
"""How a setting's records were made: times in records that were not made alike are no costs to compare."""

Costs = dict[int, float]
"""Seconds an example by batch size."""


def worked_out(records: Iterable[Record]) -> list[Record]:
    """Records of answers that were made for them, and not for another one."""
    return [record for record in records if record.error is None and not record.is_shared]


def seen(records: Sequence[Record]) -> Costs:
    """The median of requests that were answered one at a time: reading, vision, prefill and decode."""
    seconds = [sum(record.times_ms.values()) / 1000 for record in records]
    return {1: statistics.median(seconds)} if seconds else {}


def key_of(requests: Sequence[Request], settings: Settings) -> str:
    """16 hex digits for what is asked, the same with any budget of image tokens and any bundle."""
    plain = replace(settings, bundle="", image_tokens=None)
    return record_key("", [f"{request.id} {request.asked(plain)}" for request in requests])


def timed(worker: Worker, requests: Sequence[Request]) -> float | None:
    """Seconds a request of a whole job; None where nothing could be answered.

    A job that is over too soon to tell is repeated, and the fastest counts.
    """
    runs: list[float] = []
    started = time.monotonic()
    while not runs or (len(runs) < MOST_RUNS and time.monotonic() - started < LEAST_SECONDS):
        tally = run_job(worker.job(requests, {}), len(requests))
        if not (made := len(worked_out(tally.records.values()))):
            return None
        runs.append(tally.seconds / made)
    return min(runs)


class Stopwatch:
    """What requests take on this machine: seen in records, or timed where those would not tell.

    `requests` are all that a setting may be asked, `batches` the sizes to time. What it timed, and who made a setting's
    records, is kept in `measured`. Settings go by names.
    """

    def __init__(
        self, requests: Sequence[Request], batches: Sequence[int], options: WorkerOptions, measured: Measured
    ) -> None:
        self._requests, self._batches, self._measured = requests, batches, measured
        self._by = f"{options.backend} with {options.threads or 'all'} threads"
        self._made = f"{MADE}{self._by}, up to {batches[-1]} at a time"

    def note_maker(self, setting: str) -> None:
        """Say that a setting's next records will be made as this run makes them."""
        if setting not in self._measured.of(self._made):
            self._measured.keep(self._made, {setting: 1.0})
            self._measured.save()

    def costs(
        self, setting: str, records: Sequence[Record], asked_with: Settings, worker: Callable[[int], Worker]
    ) -> Costs:
        """Of a setting that made these records; `worker` is called with a batch size that was not timed yet."""
        if self._batches == [1] and self._measured.measures_of(setting, MADE) == [self._made]:
            return seen(records)
        costs: Costs = {}
        for batch in self._batches:
            first = self._requests[: max(TIMED, 2 * batch)]  # the same for every setting
            measure = f"seconds a request of {key_of(first, asked_with)}, {self._by}, {batch} at a time"
            if setting not in self._measured.of(measure):
                if (seconds := timed(worker(batch), first)) is None:
                    continue
                self._measured.keep(measure, {setting: seconds})
                self._measured.save()
            costs[batch] = self._measured.of(measure)[setting]
        return costs


class Prediction:
    """The least seconds of a request on a device. Raises InputError where the bundle does not run there."""

    def __init__(self, bundle: Bundle, device: KnownDevice, batches: Sequence[int]) -> None:
        if device.peak is None:
            raise InputError(f"the rates of {device.name} are not known", Option("device", "NAME", "of another device"))
        footprint, context = Footprint.of(bundle), min(bundle.limits.max_context, PREDICTED_CONTEXT)
        self._batches = [batch for batch in batches if not footprint.advice(device, context, batch)]
        if not self._batches:
            advice = footprint.advice(device, context, min(batches))
            raise InputError(f"{bundle.path} does not run on {device.name}", *advice)
        self._sizes, self._peak = Sizes.of(bundle), device.peak
        self._matrix_rate = {"int8": device.peak.int8, "fp8": device.peak.fp8}.get(
            bundle.precision, 0
        ) or device.peak.float16

    def costs(self, records: Sequence[Record], preprocess: Preprocess) -> Costs:
        """The median by batch size, of those that the device has memory for."""
        if not records:
            return {}
        return {
            batch: statistics.median(self._seconds(record, preprocess, batch) for record in records)
            for batch in self._batches
        }

    def _seconds(self, record: Record, preprocess: Preprocess, batch: int) -> float:
        """Of the record's pictures, prompt and answer, nothing overlapped and nothing lost.

        What a step of decoding takes is shared by a batch; pictures and prompts are worked on one after the other.
        """
        tokens, new = record.prompt_tokens or 1, record.new_tokens or 1
        total = 0.0
        for image in record.images:
            if image.width and image.height:
                total += self._stage("vision", tokens, grid=preprocess.grid(image.width, image.height))
        total += self._stage("prefill", tokens)
        return total + (new - 1) * self._stage("decode", tokens + new // 2, batch=batch) / batch

    def _stage(self, stage: str, tokens: int, *, grid: tuple[int, int] | None = None, batch: int = 1) -> float:
        costs = stage_costs(self._sizes, grid=grid, prompt_tokens=tokens, context_rows=tokens, batch=batch)
        peak = self._peak
        return ceiling(costs[stage], peak.bandwidth_bytes_per_s, self._matrix_rate, peak.float16).seconds
