"""MMMU: college subjects; the pictures stand where the question names them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pixtral_runtime.evaluation.fields import items, label, text, texts, written_list
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, RowError, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message

MARKER = re.compile(r"<image (\d+)>")
QUESTION_TYPES = ("multiple-choice", "open")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """Specification section 5.3: choices as lines "A. …", images in the place of their markers, the prompt last."""
    question, prompt, kind = text(row, "question"), PROMPTS["mmmu"], label(row, "question_type")
    if kind not in QUESTION_TYPES:
        raise RowError(f"question_type is {kind!r:.80}, expected {' or '.join(QUESTION_TYPES)}")
    references = texts(_answers(row.get("answer")), "answer")
    details: dict[str, Any] = {"question_type": kind}
    if kind == "multiple-choice":
        options = texts(items(row.get("options"), "options"), "options")
        choices = {chr(ord("A") + n): option for n, option in enumerate(options)}
        if odd := [one for one in references if one not in choices]:
            raise RowError(f"the answer {odd[0]!r:.80} is none of the letters {', '.join(choices)}")
        question += "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())
        details["choices"] = list(options)
    parts: list[str | Path] = []
    for place, part in enumerate(MARKER.split(question)):  # text, number, text, number, …
        if place % 2:
            parts.append(save(row.get(f"image_{part}")))
        elif part.strip():
            parts.append(part)
    last = parts[-1]
    if isinstance(last, str):
        parts[-1] = f"{last}\n{prompt}"
    else:
        parts.append(prompt)
    name = label(row, "id") or str(number)
    subject = "_".join(name.split("_")[1:-1]) if name.count("_") > 1 else label(row, "subfield")
    return [Example(name, (Message("user", tuple(parts)),), references, subject, details=details)]


def _answers(value: object) -> object:
    """A text with a bracket is that of a list (specification section 5.3)."""
    return written_list(value, "answer") if isinstance(value, str) and "[" in value else value


TASK = Task(
    name="mmmu",
    dataset="lmms-lab-encoder/MMMU",
    config="",
    split="validation",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline", "exact_choice", "mmmu"),
    columns=("id", "question", "options", "answer", "question_type", "image_1"),
    examples=examples,
)
