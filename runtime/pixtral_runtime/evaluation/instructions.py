"""IFEval's 25 kinds of instructions, each a check of an answer: does it have so many words, no comma, a title?

An instruction is `{"id": …}` and its arguments, as the dataset has them. Two checks differ a little from the authors'
code, which takes sentences and words from NLTK and its data: see `sentences`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import product
from typing import Any

from pixtral_runtime.errors import extra_missing
from pixtral_runtime.evaluation.sentences import capital_words, count_sentences

Instruction = Mapping[str, Any]
Check = Callable[[str, Instruction], bool]

LESS, AT_LEAST = "less than", "at least"
FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FIRST_WORD = re.compile("""[^.,?!'"]*""")
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


def followed(instruction: Instruction, answer: str) -> bool:
    """Whether the answer does as it was told; one without text never does."""
    return bool(answer.strip()) and CHECKS[instruction["id"]](answer, instruction)


def followed_loosely(instruction: Instruction, answer: str) -> bool:
    """Whether some part of the answer does: without its first line, its last, both, and each without asterisks."""
    return any(followed(instruction, version) for version in _versions(answer))


def _versions(answer: str) -> Iterator[str]:
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    for part, without in product(parts, (False, True)):
        yield part.replace("*", "") if without else part


def check_language_package() -> None:
    """Raises MissingPackageError where languages cannot be told, before anything is answered."""
    if find_spec("langdetect") is None:
        raise extra_missing("langdetect", "eval", "Telling the language of an answer")


def language_of(text: str) -> str | None:
    """Its code, such as `en` or `zh-cn`; None where nothing tells. Call `check_language_package` before.

    langdetect draws at random: from a fixed seed here, so that the same answer is judged the same way each time.
    """
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None


def _enough(count: int, wanted: int, relation: str) -> bool:
    return count < wanted if relation == LESS else count >= wanted


def _keywords(answer: str, told: Instruction) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in told["keywords"])


def _keyword_frequency(answer: str, told: Instruction) -> bool:
    found = re.findall(told["keyword"].strip(), answer, re.IGNORECASE)
    return _enough(len(found), told["frequency"], told["relation"])


def _forbidden_words(answer: str, told: Instruction) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in told["forbidden_words"])


def _letter_frequency(answer: str, told: Instruction) -> bool:
    return _enough(answer.lower().count(told["letter"].lower()), told["let_frequency"], told["let_relation"])


def _language(answer: str, told: Instruction) -> bool:
    return language_of(answer) in (told["language"], None)


def _sentences(answer: str, told: Instruction) -> bool:
    return _enough(count_sentences(answer), told["num_sentences"], told["relation"])


def _paragraphs(answer: str, told: Instruction) -> bool:
    """Between lines of three asterisks; an empty one counts nowhere at the ends, and is wrong elsewhere."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and bool(sum(parts) == told["num_paragraphs"])


def _words(answer: str, told: Instruction) -> bool:
    return _enough(len(re.findall(r"\w+", answer)), told["num_words"], told["relation"])


def _first_word_of_paragraph(answer: str, told: Instruction) -> bool:
    """Paragraphs stand between blank lines. Empty ones do not count, and yet have their place in the order."""
    parts = answer.split("\n\n")
    count, place = sum(bool(part.strip()) for part in parts), told["nth_paragraph"]
    if place > count or not (part := parts[place - 1].strip()):
        return False
    first = _FIRST_WORD.match(part.split()[0].lstrip("'").lstrip('"').lower())
    return first is not None and (count, first[0]) == (told["num_paragraphs"], told["first_word"].lower())


def _placeholders(answer: str, told: Instruction) -> bool:
    return _enough(len(re.findall(r"\[.*?\]", answer)), told["num_placeholders"], AT_LEAST)


def _postscript(answer: str, told: Instruction) -> bool:
    marker = told["postscript_marker"].strip()
    return re.search(_POSTSCRIPTS.get(marker, marker.lower()), answer.lower()) is not None


def _bullets(answer: str, told: Instruction) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return bool(len(stars) + len(dashes) == told["num_bullets"])


def _fixed_answer(answer: str, told: Instruction) -> bool:
    return any(option in answer for option in FIXED_ANSWERS)


def _highlights(answer: str, told: Instruction) -> bool:
    single = [one.strip("*") for one in re.findall(r"\*[^\n*]*\*", answer)]
    double = [one[2:-2] for one in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return _enough(sum(bool(one.strip()) for one in single + double), told["num_highlights"], AT_LEAST)


def _sections(answer: str, told: Instruction) -> bool:
    marks = re.findall(rf"\s?{told['section_spliter'].strip()}\s?\d+\s?", answer)
    return _enough(len(marks), told["num_sections"], AT_LEAST)


def _json(answer: str, told: Instruction) -> bool:
    text = answer.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str, told: Instruction) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _two_answers(answer: str, told: Instruction) -> bool:
    """Two that differ, six asterisks between them."""
    parts = [part.strip() for part in answer.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeated_prompt(answer: str, told: Instruction) -> bool:
    return answer.strip().lower().startswith(told["prompt_to_repeat"].strip().lower())


def _end(answer: str, told: Instruction) -> bool:
    return answer.strip().strip('"').lower().endswith(told["end_phrase"].strip().lower())


def _capital_words(answer: str, told: Instruction) -> bool:
    return _enough(capital_words(answer), told["capital_frequency"], told["capital_relation"])


def _english_capitals(answer: str, told: Instruction) -> bool:
    return answer.isupper() and language_of(answer) in ("en", None)


def _english_lowercase(answer: str, told: Instruction) -> bool:
    return answer.islower() and language_of(answer) in ("en", None)


def _no_comma(answer: str, told: Instruction) -> bool:
    return "," not in answer


def _quoted(answer: str, told: Instruction) -> bool:
    text = answer.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _fixed_answer,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_answers,
    "combination:repeat_prompt": _repeated_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_capitals,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
ARGUMENTS: dict[str, dict[str, type]] = {
    "keywords:existence": {"keywords": list},
    "keywords:frequency": {"keyword": str, "frequency": int, "relation": str},
    "keywords:forbidden_words": {"forbidden_words": list},
    "keywords:letter_frequency": {"letter": str, "let_frequency": int, "let_relation": str},
    "language:response_language": {"language": str},
    "length_constraints:number_sentences": {"num_sentences": int, "relation": str},
    "length_constraints:number_paragraphs": {"num_paragraphs": int},
    "length_constraints:number_words": {"num_words": int, "relation": str},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    "detectable_content:number_placeholders": {"num_placeholders": int},
    "detectable_content:postscript": {"postscript_marker": str},
    "detectable_format:number_bullet_lists": {"num_bullets": int},
    "detectable_format:number_highlighted_sections": {"num_highlights": int},
    "detectable_format:multiple_sections": {"section_spliter": str, "num_sections": int},
    "combination:repeat_prompt": {"prompt_to_repeat": str},
    "startend:end_checker": {"end_phrase": str},
    "change_case:capital_word_frequency": {"capital_frequency": int, "capital_relation": str},
}
"""What an instruction cannot do without; the others have no arguments."""
LANGUAGE_CHECKS = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
RELATIONS = ("relation", "let_relation", "capital_relation")
PATTERNS = ("keywords", "keyword", "forbidden_words", "section_spliter", "postscript_marker")
"""Arguments that are regular expressions to the authors' code, as they are here."""
