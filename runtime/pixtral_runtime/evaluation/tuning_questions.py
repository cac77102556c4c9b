"""What is asked where image tokens are tuned: questions about the user's own pictures, in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pixtral_runtime.batch.prompt_template import IMAGE, KNOWN
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.fields import asked
from pixtral_runtime.evaluation.metrics import METRICS, OF_THEIR_TASK
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import BrokenRow, Example, RowError
from pixtral_runtime.evaluation.tasks import custom
from pixtral_runtime.evaluation.tuning_divergence import DIVERGENCE
from pixtral_runtime.inputs.image_files import collect_images
from pixtral_runtime.inputs.text_file import parsed_json, read_lines
from pixtral_runtime.stats import SEED

WITH_ANSWERS, WITHOUT_ANSWERS = "exact", "mistral_anls"
"""Metrics where nobody names one: the right answer, or how alike two settings' answers are."""
TABLES = (".json", ".csv", ".tsv")
"""Files whose lines are something else than questions."""
AS_THEY_STAND = Option("questions", "FILE.jsonl", "with rows of JSON, whose questions are asked as they stand")
ANOTHER_FILE = Option("questions", "FILE", "with a question a line, or rows of JSON with question, answers and image")


@dataclass(frozen=True)
class TuneQuestions:
    """Examples in random order, each with its metric; `has_answers`: its references are the right answers."""

    examples: Sequence[Example]
    broken: Sequence[BrokenRow]
    has_answers: bool

    @property
    def metric(self) -> str:
        """How answers are scored; several where rows bring their own."""
        return " and ".join(dict.fromkeys(example.metric or "" for example in self.examples))


def read_tune_questions(file: Path, images: Path, cache: Path, metric: str | None = None) -> TuneQuestions:
    """Rows of `.jsonl` as the task `custom` has them, answers or not; of another file each line, about every picture.

    Rows name pictures in the folder `images`; what they hold as bytes is written to `cache`. The metric "divergence"
    reads no answers, so those of rows do not count. Raises InputError.
    """
    known = (*(name for name in METRICS if name not in OF_THEIR_TASK), DIVERGENCE)
    if metric is not None and metric not in known:
        raise InputError(f"there is no metric {metric!r}", Option("metric", known))
    if not images.is_dir():
        raise InputError(f"{images} is no folder", Option("images", "FOLDER", "with the pictures"))
    if is_rows(file):
        found, broken = _rows(file, ImageStore(cache, images))
    else:
        found, broken = _lines(file, images), []
    has_answers = metric != DIVERGENCE and any(example.references for example in found)
    if has_answers:
        broken += [
            BrokenRow(example.id, "it has no answers, and others have") for example in found if not example.references
        ]
        found = [example for example in found if example.references]
    if not found:
        reason = f": {broken[0].id}: {broken[0].reason}" if broken else ""
        raise InputError(f"{file} has no question that can be asked{reason}", ANOTHER_FILE)
    if metric is not None and not has_answers and not _knows_likeness(metric):
        alike = tuple(name for name in known if _knows_likeness(name))
        raise InputError(
            f"{metric} needs right answers, as it does not call equal answers equal", Option("metric", alike)
        )
    usual = WITH_ANSWERS if has_answers else WITHOUT_ANSWERS
    chosen = [
        replace(example, metric=metric or (example.metric if has_answers else None) or usual) for example in found
    ]
    random.Random(SEED).shuffle(chosen)
    return TuneQuestions(chosen, broken, has_answers)


def _knows_likeness(metric: str) -> bool:
    """Whether an answer is right by itself: others want "Final Answer:" or a number in it."""
    answer = "a blue shape"
    return metric == DIVERGENCE or METRICS[metric](answer, Example("", asked("", []), (answer,))) == 1


def is_rows(file: Path) -> bool:
    """Whether the file has rows of JSON, by its name; else it has questions that are asked of every picture."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def _rows(file: Path, store: ImageStore) -> tuple[list[Example], list[BrokenRow]]:
    found: dict[str, Example] = {}
    broken = []
    known: dict[tuple[object, ...], int] = {}
    for number, line in enumerate(read_lines(file, ANOTHER_FILE)):
        if not line.strip():
            continue
        try:
            example = _example(line, number, store)
            if not example.images:
                raise RowError("it has no picture")
            if example.id in found:
                raise RowError(f"the id {example.id} was there before")
            first = known.setdefault((example.messages, example.references, example.metric), number)
            if first != number:
                raise RowError(f"line {first + 1} asks the same, which says nothing more")
            found[example.id] = example
        except RowError as error:
            broken.append(BrokenRow(f"{file.name}, line {number + 1}", str(error)))
    return list(found.values()), broken


def _example(line: str, number: int, store: ImageStore) -> Example:
    """A row's example, without references where the row has no answers. Raises RowError."""
    try:
        row = parsed_json(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("not an object")
    if row.get("answers", row.get("answer")) is not None:
        (example,) = custom.examples(row, number, store)
        return example
    (example,) = custom.examples(row | {"answers": [""]}, number, store)
    return replace(example, references=())


def _lines(file: Path, images: Path) -> list[Example]:
    """Every line about every picture. Names are not those of `run`, which would take fewer examples for another job."""
    questions = list(dict.fromkeys(line.strip() for line in read_lines(file, ANOTHER_FILE) if line.strip()))
    if file.suffix.lower() in TABLES or (questions and questions[0][0] in "[{"):
        raise InputError(f"{file} has no question a line, and would be asked as it stands", ANOTHER_FILE)
    for question in questions:
        if question.startswith("@") or IMAGE in question or KNOWN.search(question):
            raise InputError(f"{file}: a job would not ask {question!r:.80} as it stands", AS_THEY_STAND)
    return [
        Example(f"{path}, question {number}", asked(question, [path]), ())
        for path in collect_images([str(images)])
        for number, question in enumerate(questions, start=1)
    ]
