"""MMMU: college subjects; the pictures stand where the question names them."""

from __future__ import annotations

import re
from pathlib import Path

from pixtral_runtime.evaluation.fields import label, literal, text, texts
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message

MARKER = re.compile(r"<image (\d+)>")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """Specification section 5.3: choices as lines "A. …", images in the place of their markers, the prompt last."""
    question, prompt = text(row, "question"), PROMPTS["mmmu"]
    if row.get("question_type") == "multiple-choice":
        options = literal(text(row, "options"))
        question += "".join(f"\n{chr(ord('A') + n)}. {option}" for n, option in enumerate(options))
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
    references = texts(literal(text(row, "answer")), "answer")
    name = label(row, "id") or str(number)
    subject = "_".join(name.split("_")[1:-1]) if name.count("_") > 1 else label(row, "subfield")
    details = {"question_type": row.get("question_type")}
    return [Example(name, (Message("user", tuple(parts)),), references, subject, details=details)]


TASK = Task(
    name="mmmu",
    dataset="lmms-lab/MMMU",
    config="",
    split="validation",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline", "exact_choice"),
    columns=("id", "question", "options", "answer", "question_type", "image_1"),
    examples=examples,
)
