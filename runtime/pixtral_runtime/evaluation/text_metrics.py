"""How answers to text tasks are scored: letters, final numbers, formulas, instructions, predicted tokens.

Rebuilt from what the benchmarks' own scripts do, and held against their outputs in the tests.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from pixtral_runtime.evaluation.instructions import followed, followed_loosely
from pixtral_runtime.evaluation.math_answers import boxed, same_formula
from pixtral_runtime.evaluation.task import Example

_MARKED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_BEFORE_THE_NUMBER = re.compile(r".*#### ", re.DOTALL)


def nats_per_token(answer: str, example: Example) -> float:
    """How unlikely the tokens of a text were, in the mean; the exponential of it is the perplexity."""
    told = _told(answer)
    return float(told["nats"] / told["tokens"])


def bits_per_byte(answer: str, example: Example) -> float:
    """The same per byte of the text, which compares across tokenizers."""
    told = _told(answer)
    return float(told["nats"] / math.log(2) / told["bytes"])


def tokens_of(answer: str, example: Example) -> float:
    return float(_told(answer)["tokens"])


def bytes_of(answer: str, example: Example) -> float:
    return float(_told(answer)["bytes"])


def mmlu(answer: str, references: Sequence[str]) -> float:
    """Whether the likeliest of the four letters is the right one."""
    return float(answer in references)


def gsm8k_strict(answer: str, references: Sequence[str]) -> float:
    """Whether the number after the first "#### " is the right one."""
    found = _MARKED_NUMBER.search(answer)
    return _same_number(None if found is None else found[1], references)


def gsm8k_flexible(answer: str, references: Sequence[str]) -> float:
    """Whether the last number is the right one."""
    found = _ANY_NUMBER.findall(answer)
    return _same_number(found[-1].strip() if found else None, references)


def math_equivalent(answer: str, references: Sequence[str]) -> float:
    """Whether the last formula in a box is the reference, but for how it is typeset."""
    found = boxed(answer)
    return float(found is not None and any(same_formula(found, reference) for reference in references))


def prompt_strict(answer: str, example: Example) -> float:
    """Whether all instructions were followed."""
    return float(all(_strict(answer, example)))


def prompt_loose(answer: str, example: Example) -> float:
    """The same without asterisks, the first or the last line, each instruction as it is best."""
    return float(all(_loose(answer, example)))


def instruction_strict(answer: str, example: Example) -> float:
    """The share of the instructions that were followed."""
    return _share(_strict(answer, example))


def instruction_loose(answer: str, example: Example) -> float:
    return _share(_loose(answer, example))


def instructions_of(answer: str, example: Example) -> float:
    """How many there are."""
    return float(len(example.details["instructions"]))


def _told(answer: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(answer)
    return told


def _same_number(found: str | None, references: Sequence[str]) -> float:
    return float(found is not None and any(_plain(found) == _plain(reference) for reference in references))


def _plain(number: str) -> str:
    """Without commas, dollars, what stands before the mark, and a period at the end."""
    return _BEFORE_THE_NUMBER.sub("", number.replace(",", "").replace("$", "")).removesuffix(".").lower()


def _strict(answer: str, example: Example) -> list[bool]:
    return [followed(one, answer) for one in example.details["instructions"]]


def _loose(answer: str, example: Example) -> list[bool]:
    return [followed_loosely(one, answer) for one in example.details["instructions"]]


def _share(kept: Sequence[bool]) -> float:
    return sum(kept) / len(kept)
