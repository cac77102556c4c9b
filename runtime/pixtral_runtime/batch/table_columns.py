"""The columns of a table of records: one pass over the records finds them, `row` then gives one record's cells."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.batch.records import Record

STAGES = ("image", "preprocess", "vision", "prefill", "decode")  # with columns even where no record has them
COUNTS = ("images", "prompt_tokens", "image_tokens", "reused_tokens", "new_tokens")
LARGEST_EXACT_INTEGER = 2**53  # 64-bit floats hold whole numbers below


@dataclass
class Kind:
    """Of what type a column's values are, missing ones aside: one for all, or else each is written as JSON text."""

    seen: set[type] = field(default_factory=set)
    is_exact: bool = True  # as floats

    def see(self, value: Any) -> None:
        if value is not None:
            self.seen.add(type(value))
            self.is_exact &= type(value) is not int or abs(value) < LARGEST_EXACT_INTEGER

    @property
    def type(self) -> type | None:
        """Booleans, whole numbers, numbers or text; None where there is no one type for all."""
        if self.seen == {int, float} and self.is_exact:
            return float
        is_one = self.seen in ({bool}, {float}, {str}) or (self.seen == {int} and self.is_exact)
        return next(iter(self.seen)) if is_one else None

    def cell(self, value: Any) -> Any:
        if value is None or (kind := self.type) is None:
            return None if value is None else json.dumps(value, ensure_ascii=False)
        return kind(value)


class TableColumns:
    """The columns of all `records`. `types` has the Python type of each by its name, in their order.

    JSON objects that a schema made become columns of their own, `answer.NAME`. `most_images` is the most that one
    record has.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        stages = dict.fromkeys(STAGES)
        properties: dict[str, Kind] = {}
        has_thinking, self.most_images = False, 0
        for record in records:
            has_thinking |= record.thinking is not None
            self.most_images = max(self.most_images, len(record.images))
            stages |= dict.fromkeys(record.times_ms)
            for name, value in _properties(record).items():
                properties.setdefault(name, Kind()).see(value)
        texts = ["id", "image", "question", "answer", "finish_reason", *(["thinking"] if has_thinking else [])]
        types: dict[str, type] = dict.fromkeys(texts, str)
        types = {"id": str, "image": str, "images": int} | types | dict.fromkeys(COUNTS, int)
        types |= {f"{stage}_ms": float for stage in stages} | {"error": str, "hint": str}
        types |= {f"answer.{name}": kind.type or str for name, kind in properties.items()}
        self._properties = properties
        self._shown = {name: encodable(name) for name in types}
        self.types = {self._shown[name]: kind for name, kind in types.items()}

    def row(self, record: Record) -> dict[str, Any]:
        """The record's cells by column: text, numbers, booleans or None."""
        values: dict[str, Any] = {
            "id": record.id,
            "image": record.images[0].path if record.images else None,
            "images": len(record.images),
            "question": record.question,
            "answer": record.answer,
            "finish_reason": record.finish_reason,
            "thinking": record.thinking,
            "error": record.error,
            "hint": record.hint,
        }
        values |= {name: getattr(record, name) for name in COUNTS if name not in values}
        values |= {f"{stage}_ms": float(value) for stage, value in record.times_ms.items()}
        found = _properties(record)
        values |= {f"answer.{name}": self._properties[name].cell(value) for name, value in found.items()}
        cells = {shown: values.get(name) for name, shown in self._shown.items()}
        return {name: encodable(cell) if isinstance(cell, str) else cell for name, cell in cells.items()}


def _properties(record: Record) -> dict[str, Any]:
    """The properties of an answer that a schema made; none for other answers, and for one that was cut short."""
    is_structured = any((said or {}).get("json_schema") for said in (record.own, record.settings))
    if record.answer is None or record.finish_reason != "stop" or not is_structured:
        return {}
    try:
        answer = json.loads(record.answer)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def encodable(text: str) -> str:
    """Text for UTF-8: bytes of a path that are none become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
