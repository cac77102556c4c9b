"""IFEval: instructions that a program can check, such as a number of words or no comma."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pixtral_runtime.evaluation.fields import items, label, text
from pixtral_runtime.evaluation.instructions import (
    ARGUMENTS,
    AT_LEAST,
    CHECKS,
    LANGUAGE_CHECKS,
    LESS,
    PATTERNS,
    RELATIONS,
    check_language_package,
)
from pixtral_runtime.evaluation.task import Example, Row, RowError, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    names, told = items(row.get("instruction_id_list"), "instruction_id_list"), items(row.get("kwargs"), "kwargs")
    if not names or len(names) != len(told):
        raise RowError(f"{len(names)} instructions have {len(told)} sets of arguments")
    instructions = [_instruction(name, one) for name, one in zip(names, told, strict=True)]
    asked = (Message("user", (text(row, "prompt"),)),)
    name = label(row, "key") or str(number)
    return [Example(name, asked, tuple(map(str, names)), details={"instructions": instructions})]


def _instruction(name: object, told: object) -> dict[str, Any]:
    """A table has every argument of any instruction, empty where it is another's.

    Raises RowError, and MissingPackageError where it could not be checked later.
    """
    if not isinstance(name, str) or name not in CHECKS:
        raise RowError(f"there is no instruction {name!r:.80}")
    given = {key: value for key, value in told.items() if value is not None} if isinstance(told, Mapping) else {}
    if name in LANGUAGE_CHECKS:
        check_language_package()
    wanted = ARGUMENTS.get(name, {})
    for key, kind in wanted.items():
        value = given.get(key)
        if isinstance(value, float) and value.is_integer():
            given[key] = value = int(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RowError(f"{name} has no {key}, seen {value!r:.80}")
        if key in RELATIONS and value not in (LESS, AT_LEAST):
            raise RowError(f"{name}: {key} is {value!r:.80}, expected {LESS!r} or {AT_LEAST!r}")
    arguments = {key: given[key] for key in wanted}
    for pattern in _patterns(arguments):
        try:
            re.compile(pattern)
        except re.error as error:
            raise RowError(f"{name}: {pattern!r:.80} is no pattern: {error}") from error
    return {"id": name, **arguments}


def _patterns(arguments: Mapping[str, Any]) -> Iterator[str]:
    for key in PATTERNS:
        value = arguments.get(key, ())
        for one in [value] if isinstance(value, str) else value:
            if not isinstance(one, str):
                raise RowError(f"{key} holds {one!r:.80}, which is no text")
            yield one


TASK = Task(
    name="ifeval",
    dataset="google/IFEval",
    config="",
    split="train",
    max_new_tokens=1280,
    metrics=("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"),
    columns=("key", "prompt", "instruction_id_list", "kwargs"),
    examples=examples,
    has_pictures=False,
    files=("ifeval_input_data.jsonl",),
)
