"""Your own questions: JSON lines with `image` or `images`, `question`, `answers`, and maybe `metric`, `id`, `group`."""

from __future__ import annotations

from typing import Any

from pixtral_runtime.evaluation.fields import asked, is_missing, items, items_or_one, label, text, texts
from pixtral_runtime.evaluation.metrics import METRICS, OF_THEIR_TASK
from pixtral_runtime.evaluation.task import Example, Row, RowError, SaveImage, Task


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    metric = label(row, "metric") or None
    known = [name for name in METRICS if name not in OF_THEIR_TASK]
    if metric is not None and metric not in known:
        raise RowError(f"there is no metric {metric!r:.80}, only {', '.join(known)}")
    answers = items_or_one(row["answers"], "answers") if "answers" in row else row.get("answer")
    messages = asked(text(row, "question"), [save(image) for image in _images(row)])
    choices = texts(items(row["choices"], "choices"), "choices") if not is_missing(row.get("choices")) else ()
    details = {"choices": list(choices)} if choices else {}
    name = label(row, "id") or str(number)
    return [Example(name, messages, texts(answers, "answers"), label(row, "group"), metric, details)]


def _images(row: Row) -> list[Any]:
    """None where the row names none; one that is not in a list counts as a list."""
    name = "image" if is_missing(row.get("images")) and "image" in row else "images"
    listed = items_or_one(row[name], name) if name in row else []
    return listed if isinstance(listed, list) else [listed]


TASK = Task(
    name="custom",
    dataset="",
    config="",
    split="",
    max_new_tokens=128,
    metrics=("exact",),
    columns=("question",),
    examples=examples,
)
