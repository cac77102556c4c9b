"""A whole evaluation: a bundle answers a task's questions through the batch runtime, then metrics or a judge score.

Who answers can be handed in, so that a caller may write answers to a file, show them as they come, or be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixtral_runtime.batch.fit import check_fit
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.run import Tally, run_job
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.evaluation.judge import JudgeOptions, rate_answers
from pixtral_runtime.evaluation.reading import Reader
from pixtral_runtime.evaluation.result import Evaluation, Scored, requests_of, score_answers, score_ratings
from pixtral_runtime.evaluation.shared_workers import SharedWorkers
from pixtral_runtime.evaluation.task import BrokenRow, Example, Task
from pixtral_runtime.inputs.text_windows import window_size

Answering = Callable[[Worker, Sequence[Request]], Tally]
"""Answers requests with a worker; the tally has the records of all of them."""
Progress = Callable[[str, int, int], None]
"""Called with the stage's name, ratings done and ratings in all."""


@dataclass(frozen=True)
class Questions:
    """What a bundle is asked: a task's examples, and the rows that gave none. Answers end at `max_new_tokens`.

    Where it reads texts, `window` is how many tokens it reads at a time, and `windows` the most of them.
    """

    task: Task
    examples: Sequence[Example]
    broken_rows: Sequence[BrokenRow] = ()
    max_new_tokens: int | None = None  # None: the task's own
    window: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """How images are prepared, how the worker works, and who rates where the task has no metrics.

    Without a judge, or without a file at `ratings` to keep what it says, answers to such a task stay unrated.
    """

    preprocess: str = "mistral"
    max_image_side: int | None = None
    image_tokens: int | None = None
    worker: WorkerOptions = field(default_factory=WorkerOptions)
    judge: JudgeOptions | None = None


def answer_all(worker: Worker, asked: Sequence[Request]) -> Tally:
    """Answer every request, and keep the records in memory only."""
    return run_job(worker.job(asked, {}), len(asked))


def evaluate(
    bundle: Path,
    questions: Questions,
    options: EvaluationOptions = EvaluationOptions(),
    *,
    ratings: Path | None = None,
    answer: Answering = answer_all,
    progress: Progress = lambda *_: None,
    workers: SharedWorkers | None = None,
) -> tuple[Evaluation, Mapping[str, Record]]:
    """Answers of a bundle with their scores, and the records by id.

    `workers` share a model between evaluations of a bundle that differ in how pictures are prepared.
    Raises InputError and MachineError as `Worker`, `check_fit` and `rate_answers` do, and what `answer` raises.
    """
    task, opened = questions.task, open_bundle(bundle)
    limit = task.max_new_tokens if questions.max_new_tokens is None else questions.max_new_tokens
    settings = Settings(opened.fingerprint, options.preprocess, options.max_image_side, options.image_tokens)
    if task.asks == "answer":
        worker, examples = (workers or SharedWorkers(options.worker)).worker(bundle, settings), questions.examples
    else:
        worker, examples = _reader(bundle, settings, questions, options.worker)
    asked = requests_of(examples, limit)
    if task.asks == "answer":
        check_fit(worker.prompts, asked)
    tally = answer(worker, asked)
    if task.metrics:
        scored = score_answers(task, examples, tally.records)
    else:
        scored = _rated(examples, tally.records, options.judge, ratings, progress)
    setting = {
        "bundle": str(bundle),
        "fingerprint": opened.fingerprint,
        "precision": opened.precision,
        "dtype": opened.dtype,
        "backend": worker.model.backend,
        "dataset": "/".join(filter(None, (task.dataset, task.config))),
        "split": task.split,
        "max_new_tokens": limit,
        "preprocess": options.preprocess,
        "max_image_side": options.max_image_side,
        "image_tokens": options.image_tokens,
        "window": window_size(opened.limits.max_context, questions.window) if task.asks == "tokens" else None,
        "shots": None if task.shots is None else task.shots.number,
        "judge": None if options.judge is None else options.judge.model,
        "seconds": round(tally.seconds, 1),
        "kept": tally.kept,
    }
    return Evaluation(task.name, setting, scored, questions.broken_rows), tally.records


def _reader(
    bundle: Path, settings: Settings, questions: Questions, options: WorkerOptions
) -> tuple[Worker, Sequence[Example]]:
    """Who reads, and what: the windows of texts are those of the bundle's tokens."""
    reader = Reader(bundle, settings, options, questions.task, questions.examples, questions.window, questions.windows)
    return reader, reader.examples


def _rated(
    examples: Sequence[Example],
    records: Mapping[str, Record],
    judge: JudgeOptions | None,
    path: Path | None,
    progress: Progress,
) -> list[Scored]:
    """Examples with the judge's ratings; without a judge they stay unrated."""
    ratings: dict[str, tuple[float | None, str | None]] = {}
    answered = [(example, records[example.id].answer) for example in examples if example.id in records]
    pairs = [(example, answer) for example, answer in answered if answer is not None]
    if judge is not None and path is not None:
        progress("ratings", 0, len(pairs))
        for done, rating in enumerate(rate_answers(pairs, path, judge), start=1):
            ratings[rating.id] = rating.rating, rating.error
            progress("ratings", done, len(pairs))
    return score_ratings(examples, records, ratings)
