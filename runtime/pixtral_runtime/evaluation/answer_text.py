"""What an answer's text says: the final answer that it gives, its number, its distance from another text.

The paper's levels of parsing (specification sections 5.1 and 5.4), shared by all metrics.
"""

from __future__ import annotations

import math
import re
import string

# `**Answer**: x` and `**Answer:** x` are `Answer: x`. Only these two spellings, as in mistral-evals.
_MARKED_ANSWER = re.compile(r"([aA]nswer)\**:\**")
_ANSWER = re.compile("answer:", re.IGNORECASE | re.ASCII)
_FINAL_ANSWER = re.compile("final answer:", re.IGNORECASE | re.ASCII)
_MARKUP = str.maketrans("", "", "*_[]()")
_DROPPED_AT_THE_END = frozenset(string.punctuation) - {"%"}


def baseline_answer(text: str) -> str:
    """What follows "Final Answer:" in the last line that is not blank; empty without it. Case does not matter."""
    return _after_last(_FINAL_ANSWER, text.strip().rpartition("\n")[2]).strip()


def level_1_answer(text: str) -> str:
    """What follows "Answer:", "Final" or not, in the last line that is not blank; empty without it."""
    return _after_last(_ANSWER, text.strip().rpartition("\n")[2]).strip()


def level_2_answer(text: str) -> str:
    """`answer_line` without markup."""
    return without_markup(answer_line(text))


def answer_line(text: str) -> str:
    """The first line that is not blank after the last "answer:", or what is beside it; empty where there is none."""
    rest = _after_last(_ANSWER, _MARKED_ANSWER.sub(r"\1:", text)).strip()
    return rest.partition("\n")[0].rstrip()


def final_answer(text: str) -> str:
    """`answer_line` without emphasis around it, for metrics to which brackets are part of an answer."""
    return answer_line(text).strip("*_ ")


def without_markup(text: str) -> str:
    """Without any of `* _ [ ] ( )`."""
    return text.translate(_MARKUP)


def strip_quotes(text: str) -> str:
    """Without one pair of quotation marks around it. A lone mark is empty, as in mistral-evals."""
    quoted = any(text.startswith(mark) and text.endswith(mark) for mark in "\"'")
    return text[1:-1] if quoted else text


def strip_end(text: str) -> str:
    """Without punctuation and white space at its end; a percent sign stays."""
    while text and (text[-1] in _DROPPED_AT_THE_END or text[-1].isspace()):
        text = text[:-1]
    return text


def number_in(text: str) -> float | None:
    """A text that is a finite number, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: how many characters must be inserted, deleted or replaced to make one text the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            change = diagonal if a == b else 1 + min(diagonal, row[j], row[j - 1])
            diagonal, row[j] = row[j], change
    return row[-1]


def _after_last(mark: re.Pattern[str], text: str) -> str:
    """What follows the last place where `mark` is; empty where it is nowhere."""
    _, *after = mark.split(text)
    return after[-1] if after else ""
