"""MMMU, MathVista and ChartQA scored as their authors' own scripts do, answer for answer.

`tests/data/official_scores.jsonl.gz` holds what those scripts said of some thousand answers, and where they are. They
differ from the metrics beside them in what they take for an answer: MMMU's finds a letter anywhere in the text,
MathVista's takes the choice that is nearest to what it found, ChartQA's compares the text as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pixtral_runtime.evaluation.answer_text import edit_distance

MOST_WORDS_OF_A_LETTER = 5  # of more words, MMMU's script looks for a choice's text too
CHARTQA_TOLERANCE = 0.05  # relative to the reference

_AROUND_A_LETTER = (",", ".", "!", "?", ";", ":", "'")
_BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d\d?\d?(?:,\d\d\d)+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][-+]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][-+]?\d+)(?![\d,])"),  # 12, 1.2 and .2
)
_QUOTED_ANSWER = re.compile(r'The answer is "(.*)"\.')
_LETTER_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")


def mmmu(answer: str, references: Sequence[str], choices: Sequence[str | None] = ()) -> float:
    """MMMU's score. With choices the references are letters; none is drawn where the answer holds none.

    A choice whose text is not known is None.
    """
    if choices:
        return float(mmmu_choice(answer, choices) in references)
    found, wanted = mmmu_values(answer), [value for one in references for value in _values(one)]
    return float(any(_holds(value, one) for value in found for one in wanted))


def mmmu_choice(answer: str, choices: Sequence[str | None]) -> str | None:
    """The letter that an answer names last: in brackets, else between blanks, else by the choice's own text."""
    for mark in _AROUND_A_LETTER:
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = _letters(choices)
    for form in ("({})", " {} "):
        if found := _last(text, {letter: form.format(letter) for letter in letters}):
            return found
    if len(text.split()) <= MOST_WORDS_OF_A_LETTER:
        return None
    known = {letter: choice.lower() for letter, choice in zip(letters, choices, strict=True) if choice is not None}
    return _last(text.lower(), known)


def mmmu_values(answer: str) -> set[str | float]:
    """What an answer to a question without choices may mean: ends of its lines, and the numbers in them."""
    text = answer.strip().strip(".").lower()
    *lines, last = text.split("\n")
    ends = [_end(line, _BEFORE_AN_ANSWER) for line in lines] + [_end(last, (*_BEFORE_AN_ANSWER, "="))]
    ends = [end for end in ends if end and end not in _AROUND_A_LETTER] or [text]
    numbers = [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]
    return {value for part in (*ends, *numbers) for value in _values(part)}


def mathvista(
    answer: str,
    references: Sequence[str],
    choices: Sequence[str] = (),
    answer_type: str = "",
    precision: float | None = None,
    final_answer: str = "",
) -> float:
    """MathVista's score; the reference to a question with choices is the choice's text.

    Where its rules find no answer, the authors ask GPT for it; here `final_answer` takes its place.
    """
    return float(mathvista_prediction(answer, choices, answer_type, precision, final_answer) in references)


def mathvista_prediction(
    answer: str, choices: Sequence[str], answer_type: str, precision: float | None, final_answer: str = ""
) -> str | None:
    """What MathVista's script compares with the reference: a choice, a number as text, or the text that was found.

    With choices there always is one: to an answer in which nothing was found, the shortest is the nearest.
    """
    found = _extracted(answer, choices, answer_type)
    if found is None:
        found = final_answer
    if choices:
        found = found.strip()
        if in_brackets := _LETTER_IN_BRACKETS.search(found):
            found = in_brackets[1].upper()
        letters = _letters(choices)
        if found in letters:
            return choices[letters.index(found)]
        return min(choices, key=lambda choice: edit_distance(found, choice))
    try:
        if answer_type == "integer":
            return str(int(float(found)))
        if answer_type == "float":
            return None if precision is None else str(round(float(found), int(precision)))
    except (ValueError, OverflowError):
        return None
    return found


def chartqa_relaxed(answer: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed correctness: numbers within 5 % of a reference that is not 0, a percentage as its share; else
    the same text but for case."""
    return float(any(_relaxed(answer, reference) for reference in references))


def _letters(choices: Sequence[str | None]) -> list[str]:
    return [chr(ord("A") + number) for number in range(len(choices))]


def _last(text: str, looks: dict[str, str]) -> str | None:
    """Whose look comes last in the text; None where none is in it."""
    places = {letter: text.rfind(look) for letter, look in looks.items()}
    letter = max(places, key=lambda one: places[one], default=None)
    return letter if letter is not None and places[letter] >= 0 else None


def _end(line: str, marks: Sequence[str]) -> str:
    """The shortest text behind the last of any mark, as the script has it: after an empty one it starts afresh."""
    end = ""
    for mark in marks:
        _, found, rest = line.rpartition(mark)
        if found and (not end or len(rest.strip()) < len(end)):
            end = rest.strip()
    return end


def _values(text: str) -> list[str | float]:
    """A number, rounded, or the lower-case text; of a single character with the blank that sets it apart."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _holds(found: str | float, wanted: str | float) -> bool:
    if isinstance(found, str):
        return isinstance(wanted, str) and wanted in found
    return found == wanted


def _extracted(answer: str, choices: Sequence[str], answer_type: str) -> str | None:
    """By MathVista's rules: an answer that is a choice or a number as it stands, or that is quoted in a sentence."""
    if not answer or answer in choices:
        return answer
    number = {"integer": int, "float": float}.get(answer_type)
    try:
        if number is not None:
            return str(number(answer))
    except ValueError:
        pass
    quoted = _QUOTED_ANSWER.search(answer)
    return quoted[1] if quoted else None


def _relaxed(answer: str, reference: str) -> bool:
    found, wanted = _share(answer), _share(reference)
    if found is None or not wanted:
        return answer.lower() == reference.lower()
    return abs(found - wanted) / abs(wanted) <= CHARTQA_TOLERANCE


def _share(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
