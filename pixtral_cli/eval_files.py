"""How `pixtral eval` works a benchmark off: answers through the batch runtime, then scores or a judge's ratings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_cli import output
from pixtral_cli.job_progress import open_results, work_off
from pixtral_cli.options import say_backend

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Record
    from pixtral_runtime.batch.worker import WorkerOptions
    from pixtral_runtime.evaluation.judge import JudgeOptions
    from pixtral_runtime.evaluation.result import Evaluation, Scored
    from pixtral_runtime.evaluation.task import BrokenRow, Example, Task


@dataclass(frozen=True)
class Questions:
    """What a bundle is asked: a task's examples, and the rows that gave none."""

    task: Task
    examples: Sequence[Example]
    broken: Sequence[BrokenRow]
    max_new_tokens: int


@dataclass(frozen=True)
class Files:
    """What is written: the result, the answers beside it, the ratings where a judge gives them, and a page."""

    save: Path | None
    html: Path | None
    resume: bool
    force: bool

    @property
    def answers(self) -> Path | None:
        return None if self.save is None else self.save.with_suffix(".answers.jsonl")

    @property
    def ratings(self) -> Path | None:
        return None if self.save is None else self.save.with_suffix(".ratings.jsonl")

    def of_reference(self) -> Files:
        """For the other bundle of a comparison."""
        save = None if self.save is None else self.save.with_suffix(".against.json")
        return Files(save, None, self.resume, self.force)

    def check(self) -> None:
        """Refuse what could not be written, before the hours that it may take. Raises InputError."""
        from pixtral_runtime.errors import InputError

        if self.resume and self.save is None:
            raise InputError("--resume needs a file to go on with", "--save result.json")
        for path, option in ((self.save, "--save"), (self.html, "--html")):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise InputError(f"{path} cannot be written: it is a folder, or in none", f"{option} NAME")
        if self.save is not None and self.save.exists() and not (self.resume or self.force):
            raise InputError(f"{self.save} exists", "--resume to go on with it, or --force to replace it")


def image_cache() -> Path:
    """Where images of parquet files are kept, unless the user names a place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixtral" / "eval"


def judge_options(task: Task, url: str | None, model: str, save: Path | None) -> JudgeOptions | None:
    """The judge, or None where the task has metrics or no judge was named. Raises InputError, MachineError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.evaluation.judge import JudgeOptions

    if task.metrics:
        if url is not None:
            raise InputError(f"{task.name} has metrics and needs no judge", "leave --judge-url away")
        return None
    if save is None:
        raise InputError(f"{task.name} is rated by a judge, and ratings must be kept", "--save result.json")
    if url is None:
        output.warn("no judge: answers are kept, and rated by the same command with --resume --judge-url URL")
        return None
    output.require("openai", "eval", "Asking a judge")
    return JudgeOptions(url, model)


def evaluate(
    bundle: Path,
    questions: Questions,
    seen: tuple[str, int | None, int | None],
    options: WorkerOptions,
    judge: JudgeOptions | None,
    files: Files,
) -> tuple[Evaluation, dict[str, Record]]:
    """Answer, score and save; also the records by id.

    `seen` is how images are preprocessed: mode, longest side, most tokens. The first Ctrl-C finishes what runs.
    """
    from pixtral_runtime.batch.fit import check_fit
    from pixtral_runtime.batch.records import Settings
    from pixtral_runtime.batch.worker import Worker
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.evaluation.result import Evaluation, requests_of, score_answers

    task, opened = questions.task, open_bundle(bundle)
    settings = Settings(opened.fingerprint, *seen)
    asked = requests_of(questions.examples, questions.max_new_tokens)
    worker = Worker(bundle, settings, options)
    check_fit(worker.prompts, asked)
    with open_results(files.answers, asked, settings, resume=files.resume, force=files.force) as file:
        job = worker.job(asked, {} if file is None else file.done)
        say_backend(worker.model)
        tally = work_off(job, len(asked), file, print_answers=False)
    records = tally.records
    scored = (
        score_answers(task, questions.examples, records)
        if task.metrics
        else _rated(questions.examples, records, judge, files.ratings)
    )
    setting: dict[str, Any] = {
        "bundle": str(bundle),
        "fingerprint": opened.fingerprint,
        "precision": opened.precision,
        "dtype": opened.dtype,
        "backend": worker.model.backend,
        "dataset": "/".join(filter(None, (task.dataset, task.config))),
        "split": task.split,
        "max_new_tokens": questions.max_new_tokens,
        "preprocess": seen[0],
        "max_image_side": seen[1],
        "image_tokens": seen[2],
        "judge": None if judge is None else judge.model,
        "seconds": round(tally.seconds, 1),
        "kept": tally.kept,
    }
    evaluation = Evaluation(task.name, setting, scored, questions.broken)
    if files.save is not None:
        evaluation.save(files.save)
    return evaluation, records


def _rated(
    examples: Sequence[Example], records: Mapping[str, Record], judge: JudgeOptions | None, path: Path | None
) -> list[Scored]:
    """Examples with the judge's ratings; without a judge they stay unrated."""
    from pixtral_runtime.evaluation.judge import rate_answers
    from pixtral_runtime.evaluation.result import score_ratings

    ratings: dict[str, tuple[float | None, str | None]] = {}
    answered = [(example, records[example.id].answer) for example in examples if example.id in records]
    pairs = [(example, answer) for example, answer in answered if answer is not None]
    if judge is not None and path is not None:
        with output.progress() as bars:
            bars.stage("ratings", 0, len(pairs))
            for done, rating in enumerate(rate_answers(pairs, path, judge), start=1):
                ratings[rating.id] = rating.rating, rating.error
                bars.stage("ratings", done, len(pairs))
    return score_ratings(examples, records, ratings)
