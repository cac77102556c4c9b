"""Settings of image tokens put to real bundles: who answers, what the answers are worth, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixtral_runtime.batch.fit import check_fit
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.run import Tally
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bench.roofline import Sizes, ceiling, stage_costs
from pixtral_runtime.bundle.device_catalog import KnownDevice
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.result import requests_of
from pixtral_runtime.evaluation.shared_workers import SharedWorkers
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tuning import Scores
from pixtral_runtime.evaluation.tuning_questions import TuneQuestions
from pixtral_runtime.inputs.image import stored_size
from pixtral_runtime.inputs.preprocess import Preprocess, default_preprocess, token_count

LEAST_TOKENS = 64  # of a grid that nobody named


@dataclass(frozen=True)
class TuneSetting:
    """A bundle, and the most tokens that a picture takes; None for all that its pixels give."""

    bundle: Path
    image_tokens: int | None

    @property
    def tokens(self) -> str:
        return "full" if self.image_tokens is None else str(self.image_tokens)


@dataclass(frozen=True)
class Reply:
    """What a setting made of an example. `seconds` are None where nothing was worked out for it."""

    record: Record
    seconds: float | None


Ask = Callable[[TuneSetting, Worker, Sequence[Request]], Tally]
"""Has a worker answer requests; the tally has the records of all of them. It may keep what was answered before."""


def settings_grid(
    bundles: Sequence[Path], examples: Iterable[Example], image_tokens: Sequence[int | None] | None, preprocess: str
) -> list[TuneSetting]:
    """Each bundle with each budget, fewest tokens first, all of a picture's tokens last.

    Budgets that nobody named double from `LEAST_TOKENS` and end below what the largest of the pictures takes.
    """
    pictures = {path for example in examples for path in example.images}
    sizes = {size for path in pictures if (size := stored_size(path)) is not None}
    settings = []
    for bundle in bundles:
        tokens = image_tokens
        if tokens is None:
            whole = default_preprocess(open_bundle(bundle), mode=preprocess)
            largest = max((token_count(*whole.grid(*size)) for size in sizes), default=0)
            tokens = [LEAST_TOKENS << step for step in range(16) if LEAST_TOKENS << step < largest] + [None]
        ordered = sorted(set(tokens), key=lambda count: (count is None, count or 0))
        settings += [TuneSetting(bundle, count) for count in ordered]
    return settings


class Trial:
    """Settings that answer examples, for `tuning.tune`: call it with a setting's number and a count of examples.

    Without right answers those of the setting `reference` are what the others are judged by. Costs are seconds a
    request, measured here, or the least that `device` could take. One model is loaded at a time, and settings of a
    bundle share it. Raises InputError where a bundle does not fit the device, and as `Worker` and `check_fit` do.
    """

    def __init__(
        self,
        settings: Sequence[TuneSetting],
        questions: TuneQuestions,
        options: WorkerOptions,
        ask: Ask,
        *,
        preprocess: str = "mistral",
        max_new_tokens: int = 128,
        device: KnownDevice | None = None,
    ) -> None:
        self.settings, self.questions = settings, questions
        self.reference = None if questions.has_answers else _dearest(settings)
        self.replies: list[dict[str, Reply]] = [{} for _ in settings]
        self._ask, self._preprocess = ask, preprocess
        self._max_new_tokens = max_new_tokens
        self._workers = SharedWorkers(options)
        self._device = device
        bundles = {setting.bundle: open_bundle(setting.bundle) for setting in settings}
        self.bundles = bundles
        self._predictions = {} if device is None else {path: _Prediction(one, device) for path, one in bundles.items()}

    def __call__(self, setting: int, count: int) -> Scores:
        if self.reference is not None and setting != self.reference:
            self._answer(self.reference, count)
        self._answer(setting, count)
        examples = self.questions.examples[:count]
        return np.array([self.score(setting, example) for example in examples], np.float64)

    def score(self, setting: int, example: Example) -> float:
        """Of the setting's answer; NaN where there is none, or nothing to judge it by."""
        reply = self.replies[setting].get(example.id)
        if reply is None or reply.record.error is not None:
            return float("nan")
        if self.reference is not None:
            right = self.replies[self.reference][example.id].record
            if right.error is not None:
                return float("nan")
            example = replace(example, references=(right.answer or "",))
        return METRICS[example.metric or ""](reply.record.answer or "", example)

    def cost(self, setting: int) -> float:
        """Median seconds a request. More tokens never count as cheaper in the same bundle: then it was the machine."""
        costs = []
        for other in range(setting, len(self.settings)):
            seconds = [reply.seconds for reply in self.replies[other].values() if reply.seconds is not None]
            if seconds and self.settings[other].bundle == self.settings[setting].bundle:
                costs.append(statistics.median(seconds))
        return min(costs, default=0.0)

    @property
    def backend(self) -> str:
        """What ran the last bundle, and why."""
        return self._workers.backend

    def image_tokens(self, setting: int) -> float:
        """Mean over the answered requests."""
        counts = [reply.record.image_tokens or 0 for reply in self.replies[setting].values()]
        return statistics.fmean(counts) if counts else 0.0

    def _answer(self, setting: int, count: int) -> None:
        known, examples = self.replies[setting], self.questions.examples[:count]
        if len(known) >= count:
            return
        bundle, tokens = self.settings[setting].bundle, self.settings[setting].image_tokens
        settings = Settings(self.bundles[bundle].fingerprint, self._preprocess, image_tokens=tokens)
        worker = self._workers.worker(bundle, settings)
        asked = requests_of(examples, self._max_new_tokens)
        check_fit(worker.prompts, asked)
        records = self._ask(self.settings[setting], worker, asked).records
        for example in examples[len(known) :]:
            known[example.id] = Reply(records[example.id], self._seconds(setting, worker, records[example.id]))

    def _seconds(self, setting: int, worker: Worker, record: Record) -> float | None:
        if record.error is not None or record.is_shared:
            return None
        if self._device is None:
            return sum(record.times_ms.values()) / 1000
        return self._predictions[self.settings[setting].bundle].seconds(record, worker.prompts.preprocess)


class _Prediction:
    """The least seconds of a request on a device. Raises InputError where the bundle does not run there."""

    def __init__(self, bundle: Bundle, device: KnownDevice) -> None:
        if device.peak is None:
            raise InputError(f"the rates of {device.name} are not known", Option("device", "NAME", "of another device"))
        advice = Footprint.of(bundle).advice(device, min(bundle.limits.max_context, 4096), 1)
        if advice:
            raise InputError(f"{bundle.path} does not run on {device.name}", *advice)
        self._sizes, self._peak = Sizes.of(bundle), device.peak
        self._matrix_rate = {"int8": device.peak.int8, "fp8": device.peak.fp8}.get(
            bundle.precision, 0
        ) or device.peak.float16

    def seconds(self, record: Record, preprocess: Preprocess) -> float:
        """Of the record's pictures, prompt and answer, nothing overlapped and nothing lost."""
        tokens, new = record.prompt_tokens or 1, record.new_tokens or 1
        total = 0.0
        for image in record.images:
            if image.width and image.height:
                total += self._stage("vision", tokens, preprocess.grid(image.width, image.height))
        total += self._stage("prefill", tokens)
        return total + (new - 1) * self._stage("decode", tokens + new // 2)

    def _stage(self, stage: str, tokens: int, grid: tuple[int, int] | None = None) -> float:
        costs = stage_costs(self._sizes, grid=grid, prompt_tokens=tokens, context_rows=tokens)
        peak = self._peak
        return ceiling(costs[stage], peak.bandwidth_bytes_per_s, self._matrix_rate, peak.float16).seconds


def _dearest(settings: Sequence[TuneSetting]) -> int:
    """All tokens of the first bundle, or the most that were named."""
    of_first = [number for number, setting in enumerate(settings) if setting.bundle == settings[0].bundle]
    return of_first[-1]
