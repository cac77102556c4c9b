"""Settings of image tokens put to real bundles: who answers, what the answers are worth, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pixtral_runtime.batch.fit import check_fit
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.run import Tally
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bundle.device_catalog import KnownDevice
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.compare.compare import check_comparable
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.curve import budget_name, tokens_a_picture
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.result import requests_of
from pixtral_runtime.evaluation.shared_workers import SharedWorkers
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tuning import Afford, Scores
from pixtral_runtime.evaluation.tuning_costs import Costs, Prediction, Stopwatch, seen, worked_out
from pixtral_runtime.evaluation.tuning_divergence import DIVERGENCE, Nearness, Progress
from pixtral_runtime.evaluation.tuning_measured import Measured
from pixtral_runtime.evaluation.tuning_questions import TuneQuestions
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.image import stored_size
from pixtral_runtime.inputs.preprocess import default_preprocess, token_count

LEAST_TOKENS = 64  # of a grid that nobody named


@dataclass(frozen=True)
class TuneSetting:
    """A bundle, and the most tokens that a picture takes; None for all that its pixels give."""

    bundle: Path
    image_tokens: int | None

    @property
    def tokens(self) -> str:
        return budget_name(self.image_tokens)


Ask = Callable[[TuneSetting, Worker, Sequence[Request]], Tally]
"""Has a worker answer requests; the tally has the records of all of them. It may keep what was answered before."""


def settings_grid(
    bundles: Sequence[Path], examples: Iterable[Example], image_tokens: Sequence[int | None] | None, preprocess: str
) -> list[TuneSetting]:
    """Each bundle with each budget, fewest tokens first, all of a picture's tokens last.

    A bundle that is named twice counts once. Budgets that nobody named double from `LEAST_TOKENS` and end below what
    the largest of the pictures takes. Raises InputError for two copies of a bundle in folders of one name.
    """
    named: dict[str, Path] = {}
    for path in bundles:
        same = named.setdefault(setting_name(TuneSetting(path, None)), path)
        if same.resolve() != path.resolve():
            raise InputError(f"{same} and {path} are the same bundle", "one of them, as both answer alike")
    pictures = {path for example in examples for path in example.images}
    sizes = {size for path in pictures if (size := stored_size(path)) is not None}
    settings = []
    for bundle in named.values():
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
    request with the best of `batches`, measured here, or the least that `device` could take. One model is loaded at a
    time, and settings of a bundle share it. What no record has is kept in `measured`. Raises InputError where a bundle
    does not fit the device, or there are fewer examples than a batch has, and as `Worker` and `check_fit` do.
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
        batches: Sequence[int] = (1,),
        measured: Measured | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.settings, self.questions, self.batches = settings, questions, sorted(set(batches))
        if self.batches[-1] > len(questions.examples):
            raise InputError(
                f"{self.batches[-1]} requests at a time are more than the {len(questions.examples)} examples",
                Option("batch", len(questions.examples)),
            )
        self.reference = None if questions.has_answers else _dearest(settings)
        self.replies: list[dict[str, Record]] = [{} for _ in settings]
        self.bundles = {setting.bundle: open_bundle(setting.bundle) for setting in settings}
        self._ask, self._preprocess, self._max_new_tokens = ask, preprocess, max_new_tokens
        self._workers = SharedWorkers(replace(options, batch=self.batches[-1]))
        measured = measured or Measured()
        requests = requests_of(questions.examples, max_new_tokens)
        self._stopwatch = Stopwatch(requests, self.batches, options, measured)
        self._costs: list[Costs] = [{} for _ in settings]
        self._pace = [0.0] * len(settings)
        self._predictions = (
            {}
            if device is None
            else {path: Prediction(one, device, self.batches) for path, one in self.bundles.items()}
        )
        self._nearness: Nearness | None = None
        if questions.metric == DIVERGENCE and self.reference is not None:
            models = {setting: partial(self._model, setting) for setting in range(len(settings))}
            self._nearness = Nearness(
                models, self.reference, max_new_tokens, measured, self._key, self._reference_key, progress
            )
            for bundle in self.bundles.values():
                check_comparable(self.bundles[settings[self.reference].bundle], bundle)

    def __call__(self, setting: int, count: int) -> Scores:
        examples = self.questions.examples[:count]
        if self.reference is not None and setting != self.reference:
            self._answer(self.reference, count)
            if self._nearness is not None:
                judged = [example for example in examples if self._is_answered(self.reference, example)]
                self._pace[self.reference] += self._nearness.predict(setting, judged)
        self._answer(setting, count)
        if self._nearness is not None:
            both = [example for example in examples if self._is_answered(setting, example)]
            self._pace[setting] += self._nearness.work_out(setting, both)
        return np.array([self.score(setting, example) for example in examples], np.float64)

    def score(self, setting: int, example: Example) -> float:
        """Of the setting's answer; NaN where there is none, or nothing to judge it by."""
        if not self._is_answered(setting, example):
            return float("nan")
        if self._nearness is not None:
            return self._nearness.score(setting, example)
        if self.reference is not None:
            example = replace(example, references=(self.replies[self.reference][example.id].answer or "",))
        return METRICS[example.metric or ""](self.replies[setting][example.id].answer or "", example)

    def costs(self, setting: int) -> Costs:
        """Seconds a request by batch size. More tokens never count as cheaper in the same bundle.

        Where they seem to, it was the machine.
        """
        same = [
            self._costs[other]
            for other in range(setting, len(self.settings))
            if self.settings[other].bundle == self.settings[setting].bundle
        ]
        return {
            batch: min(costs[batch] for costs in same if batch in costs)
            for batch in self.batches
            if any(batch in costs for costs in same)
        }

    def cost(self, setting: int) -> float:
        """Seconds a request with the best batch size."""
        return min(self.costs(setting).values(), default=0.0)

    def batch(self, setting: int) -> int:
        """The size with which a request costs least, the smallest of equals."""
        costs = self.costs(setting)
        return min(costs, key=lambda batch: (costs[batch], batch), default=self.batches[0])

    def pace(self, setting: int) -> float:
        """Seconds that an example took this machine, as far as it has answered; for bounding the work."""
        return self._pace[setting]

    @property
    def requests(self) -> int:
        """Answered by all settings together."""
        return sum(map(len, self.replies))

    @property
    def backend(self) -> str:
        """What ran the last bundle, and why."""
        return self._workers.backend

    def image_tokens(self, setting: int) -> float:
        """Mean over the pictures of answered requests; 0 where there is none."""
        return tokens_a_picture(self.replies[setting].values()) or 0.0

    @property
    def unanswered(self) -> int:
        """Examples that some setting was asked and could not answer."""
        return len({record.id for replies in self.replies for record in replies.values() if record.error is not None})

    def _is_answered(self, setting: int, example: Example) -> bool:
        """By the setting, and by the one that it is judged by."""
        replies = [self.replies[one].get(example.id) for one in (setting, self.reference) if one is not None]
        return all(reply is not None and reply.error is None for reply in replies)

    def _answer(self, setting: int, count: int) -> None:
        known, examples = self.replies[setting], self.questions.examples[:count]
        if len(known) >= count:
            return
        worker = self._worker(setting)
        asked = requests_of(examples, self._max_new_tokens)
        check_fit(worker.prompts, asked)
        self._stopwatch.note_maker(self._key(setting))
        tally = self._ask(self.settings[setting], worker, asked)
        for example in examples[len(known) :]:
            known[example.id] = tally.records[example.id]
        records = worked_out(known.values())
        seconds = seen(records).get(1, 0.0) / self.batches[-1]
        self._pace[setting] = tally.seconds / tally.made if tally.made else seconds
        self._costs[setting] = self._costs_of(setting, records, worker)

    def _costs_of(self, setting: int, records: Sequence[Record], worker: Worker) -> Costs:
        bundle = self.settings[setting].bundle
        if bundle in self._predictions:
            return self._predictions[bundle].costs(records, worker.prompts.preprocess)
        return self._stopwatch.costs(self._key(setting), records, worker.settings, partial(self._worker, setting))

    def _worker(self, setting: int, batch: int | None = None) -> Worker:
        bundle, tokens = self.settings[setting].bundle, self.settings[setting].image_tokens
        settings = Settings(self.bundles[bundle].fingerprint, self._preprocess, image_tokens=tokens)
        return self._workers.worker(bundle, settings, batch)

    def _model(self, setting: int) -> Model:
        return self._worker(setting).model

    def _key(self, setting: int) -> str:
        return setting_name(self.settings[setting])

    def _reference_key(self, example: Example) -> str:
        """What the reference was asked of an example that it answered, and of which contents."""
        return self.replies[self.reference or 0][example.id].key or example.id


def setting_name(setting: TuneSetting) -> str:
    """After what decides the answers: the bundle's folder and fingerprint, and the tokens."""
    opened = open_bundle(setting.bundle)
    return f"{opened.path.resolve().name}-{opened.fingerprint[:8]}-{setting.tokens}"


def within_requests(trial: Trial, most: int) -> Afford:
    """As many examples as `most` requests of all settings together allow."""
    return lambda settings: (most - trial.requests) // len(settings)


def within_seconds(trial: Trial, end: float) -> Afford:
    """As many examples as are likely done when `time.monotonic()` is at `end`; one where nothing is known yet."""

    def more(settings: Sequence[int]) -> int:
        if not trial.requests:
            return 1
        of_one = sum(map(trial.pace, settings))
        return max(0, int((end - time.monotonic()) / max(of_one, 1e-9)))

    return more


def _dearest(settings: Sequence[TuneSetting]) -> int:
    """All tokens of the first bundle, or the most that were named."""
    of_first = [number for number, setting in enumerate(settings) if setting.bundle == settings[0].bundle]
    return of_first[-1]
