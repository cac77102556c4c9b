"""What `pixtral eval` writes and where, whom it asks to rate, and an evaluation shown as it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.job_progress import answer_requests, writing_to
from pixtral_cli.options import refuse_unused, start_job

if TYPE_CHECKING:
    import typer

    from pixtral_runtime.batch.records import Record, Request
    from pixtral_runtime.batch.run import Tally
    from pixtral_runtime.batch.worker import Worker
    from pixtral_runtime.evaluation.judge import JudgeOptions
    from pixtral_runtime.evaluation.result import Evaluation
    from pixtral_runtime.evaluation.run import EvaluationOptions, Questions
    from pixtral_runtime.evaluation.shared_workers import SharedWorkers
    from pixtral_runtime.evaluation.task import Task


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

    def of_budget(self, image_tokens: int | None) -> Files:
        """For one budget of a curve."""
        from pixtral_runtime.evaluation.curve import result_of_budget

        save = None if self.save is None else result_of_budget(self.save, image_tokens)
        return Files(save, None, self.resume, self.force)

    def check(
        self,
        inputs: Iterable[Path],
        data: Path | None,
        *,
        budgets: Sequence[int | None],
        is_rated: bool,
        against_bundle: bool,
    ) -> None:
        """Refuse what could not be written, before the hours that it may take. Raises InputError, MachineError.

        `data` is the dataset's folder; `budgets`: several have a result each; `is_rated`: a judge's ratings are kept as
        well; `against_bundle`: the other bundle's result and answers.
        """
        from pixtral_runtime.errors import InputError, Option
        from pixtral_runtime.evaluation.curve import saved_budgets
        from pixtral_runtime.evaluation.dataset import may_hold_rows
        from pixtral_runtime.files import Output, check_outputs

        if self.resume and self.save is None:
            raise InputError("--resume needs a file to go on with", "--save result.json")
        if self.resume and self.save is not None and self.save.exists():
            known = saved_budgets(self.save) or [None]
            if (len(known) > 1) != (len(budgets) > 1):
                what = f"a curve over {len(known)} budgets" if len(known) > 1 else "the result of one budget"
                raise InputError(f"{self.save} is {what} of image tokens, and would be lost", "--save another.json")
        paths: list[Path | None] = []
        for files in (self, self.of_reference()) if against_bundle else (self,):
            several = [files.of_budget(budget) for budget in budgets] if len(budgets) > 1 else []
            paths += [files.save] if several else []
            for one in several or [files]:
                paths += [one.save, one.answers, one.ratings if is_rated else None]
        places = [*((path, Option("save", "result.json")) for path in paths), (self.html, Option("html", "eval.html"))]
        replaces = self.resume or self.force
        outputs = [Output(path, option, replaces, resumable=True) for path, option in places if path is not None]
        rows = [to.path for to in outputs if data is not None and may_hold_rows(to.path, data)]
        check_outputs(outputs, [*inputs, *rows])

    def check_pictures(self, pictures: Iterable[Path]) -> None:
        """Refuse to replace one of the pictures that are asked about, once they are known. Raises InputError."""
        from pixtral_runtime.errors import Option
        from pixtral_runtime.files import Output, check_outputs

        places = (self.save, Option("save", "result.json")), (self.html, Option("html", "eval.html"))
        there = [Output(path, option, True, resumable=True) for path, option in places if path and path.exists()]
        if there:
            check_outputs(there, pictures)


def image_cache() -> Path:
    """Where images of parquet files are kept, unless the user names a place. Raises InputError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.files import cache_folder

    if (folder := cache_folder()) is None:
        raise InputError("this user has no home folder to keep images in", "--cache FOLDER")
    return folder / "eval"


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


def refuse_unused_by_task(context: typer.Context, task: Task) -> None:
    """Raise InputError for an option that would do nothing for this task."""
    if not task.has_pictures:
        pictures = ("cache", "max_image_side", "image_tokens", "preprocess")
        refuse_unused(context, pictures, f"with {task.name}, which has no pictures")
    if task.asks != "answer":
        answers = ("max_new_tokens", "batch", "memory_limit")
        refuse_unused(context, answers, f"with {task.name}, which is read and not answered")
    if task.asks != "tokens":
        refuse_unused(context, ("window",), f"with {task.name}", "--task perplexity")
    if task.shots is None:
        refuse_unused(context, ("shots",), f"with {task.name}", "--task mmlu")


def evaluate_bundle(
    bundle: Path, questions: Questions, options: EvaluationOptions, files: Files, workers: SharedWorkers | None = None
) -> tuple[Evaluation, Mapping[str, Record]]:
    """Answer, score and save; also the records by id. The first Ctrl-C finishes what runs.

    `workers` share a model between budgets of image tokens.
    """
    from pixtral_runtime.errors import Option
    from pixtral_runtime.evaluation.run import evaluate

    with output.progress() as bars:

        def answer(worker: Worker, asked: Sequence[Request]) -> Tally:
            with writing_to(Option("save", "another.json")):
                return answer_requests(
                    partial(start_job, worker), asked, worker.settings, files.answers,
                    resume=files.resume, force=files.force, bars=bars,
                )  # fmt: skip

        evaluation, records = evaluate(
            bundle, questions, options, ratings=files.ratings, answer=answer, progress=bars.stage, workers=workers
        )
    if files.save is not None:
        evaluation.save(files.save)
    return evaluation, records
