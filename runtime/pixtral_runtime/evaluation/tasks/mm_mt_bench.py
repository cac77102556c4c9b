"""MM-MT-Bench: conversations about pictures, whose turns a judge rates from 1 to 10 (specification section 5.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixtral_runtime.evaluation.fields import label
from pixtral_runtime.evaluation.task import Example, Row, RowError, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.text_file import parsed_json

ANSWERED_ROLES = ("user", "assistant")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """A turn each, after the references of the turns before it. The image is the first chunk of the first message."""
    turns = _turns(row.get("conversation"))
    image = save(row.get("image"))
    history: list[Message] = []
    found = []
    for turn in range(len(turns) // 2):
        question, reference = turns[2 * turn : 2 * turn + 2]
        content: tuple[str | Path, ...] = (question,) if turn else (image, question)
        history.append(Message("user", content))
        details = {"conversation": number, "turn": turn + 1, "turns": len(turns) // 2}
        name, group = f"{number}.{turn + 1}", label(row, "category")
        found.append(Example(name, tuple(history), (reference,), group, details=details))
        history.append(Message("assistant", (reference,)))
    return found


def _turns(source: object) -> list[str]:
    """Texts by turns of user and assistant, from JSON text or what it holds. Raises RowError."""
    try:
        messages = parsed_json(source) if isinstance(source, str) else source
    except (ValueError, RecursionError) as error:
        raise RowError(f"conversation is not JSON: {error}") from error
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise RowError("conversation is no list of questions and answers")
    return [_text(message, ANSWERED_ROLES[place % 2]) for place, message in enumerate(messages)]


def _text(message: Any, role: str) -> str:
    content = message.get("content") if isinstance(message, dict) and message.get("role") == role else None
    if isinstance(content, list):  # chunks; the image's holds no text
        said = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in said if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        raise RowError(f"conversation: expected a message of the {role}, found {message!r:.80}")
    return content


TASK = Task(
    name="mm_mt_bench",
    dataset="mistralai/MM-MT-Bench",
    config="",
    split="eval",
    max_new_tokens=4096,
    metrics=(),
    columns=("image", "conversation", "category"),
    examples=examples,
)
