"""How answers are scored: every metric by name, from 0 to 1.

Those of mistral-evals are here, rebuilt from specification section 5.4, so that scores compare with the paper's. The
benchmarks' own, stricter ones are in `official_metrics`. A score means nothing without its metric's name.

| name | by | says |
| --- | --- | --- |
| `mistral_vqa_match` | mistral-evals | a third for each of up to three references that are the answer to the letter |
| `mistral_anls` | mistral-evals | 1 less the edit distance's share of the length, nothing cut off |
| `relaxed_correctness` | mistral-evals | the answer as it is; numbers may be off by 5 % |
| `baseline` | the paper | the same, of "Final Answer: …" in the answer's last line |
| `level_1` | the paper | also of "Answer: …" |
| `level_2` | mistral-evals "explicit" | also elsewhere, without markdown; what the paper's main tables are by |
| `level_3` | mistral-evals "anywhere" | also without "Answer:", the reference somewhere in the text: an upper bound |
| `vqa_accuracy` | VQA | share of the people who gave this answer, normalized |
| `anls` | DocVQA | as above; below 0.5 counts as 0 |
| `exact_choice` | MMMU, MathVista | the very letter, number or phrase |
| `mmmu` | MMMU | the letter named last, or the number or phrase that sentences end with |
| `mathvista` | MathVista | the choice nearest to the answer found, or the number, rounded |
| `chartqa_relaxed` | ChartQA | as its scorers since pix2struct: numbers may be off by 5 % |
| `exact` | here | the same text, whatever its case |
| `nats_per_token`, `bits_per_byte` | here | how unlikely a text was; not from 0 to 1, and less is better |
| `mmlu` | MMLU | the likeliest of the four letters |
| `gsm8k_strict`, `gsm8k_flexible` | lm-evaluation-harness | the number after "####", the last number |
| `math_equivalent` | MATH | the formula in the last box, but for typesetting |
| `prompt_strict`, `prompt_loose` | IFEval | all instructions were followed, loosely: by some part of the answer |
| `instruction_strict`, `instruction_loose` | IFEval | how many of them |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pixtral_runtime.evaluation import author_metrics, official_metrics, text_metrics
from pixtral_runtime.evaluation.answer_text import (
    baseline_answer,
    edit_distance,
    final_answer,
    level_1_answer,
    level_2_answer,
    number_in,
    strip_end,
    strip_quotes,
)
from pixtral_runtime.evaluation.task import Example

CHOICE_LETTER = re.compile("[A-Z]")
NUMBER_TOLERANCE = 0.05  # of a number, relative to the reference


def mistral_vqa_match(answer: str, references: Sequence[str]) -> float:
    """A third for each reference that is the answer but for quotation marks, 1 at most. Case matters."""
    wanted = strip_quotes(answer)
    return min(1.0, sum(strip_quotes(reference) == wanted for reference in references) / 3)


def mistral_anls(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference; case, runs of white space and punctuation at the end do not matter."""
    return max((_similarity(_plain(answer), _plain(reference)) for reference in references), default=0.0)


def relaxed_correctness(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references.

    Numbers may be off by 5 %, and a percentage is also its share. Of an answer to a letter only the first character
    counts. Case does not matter, nor white space around the answer.
    """
    return _relaxed_any(answer.strip(), references)


def baseline(answer: str, references: Sequence[str]) -> float:
    """Relaxed correctness where "Final Answer: …" ends the answer, else 0."""
    return _parsed(baseline_answer(answer), references)


def level_1(answer: str, references: Sequence[str]) -> float:
    """Relaxed correctness where "Final Answer: …" or "Answer: …" ends the answer, else 0."""
    return _parsed(level_1_answer(answer), references)


def level_2(answer: str, references: Sequence[str]) -> float:
    """Relaxed correctness where "answer: …" is anywhere in the answer, markdown or not, else 0. The last one counts."""
    return _parsed(level_2_answer(answer), references)


def level_3(answer: str, references: Sequence[str]) -> float:
    """As level 2; an answer that level 2 finds nothing in is searched for the references.

    Rewards what is wrong: "is a" matches the letter A, "6000" the number 6.
    """
    if found := level_2_answer(answer):
        return _parsed(found, references)
    return float(any(pattern in answer for reference in references for pattern in _patterns(reference)))


def _parsed(found: str, references: Sequence[str]) -> float:
    return _relaxed_any(found, references) if found else 0.0


def _relaxed_any(answer: str, references: Sequence[str]) -> float:
    return float(any(_relaxed(_clean(answer), _clean(reference)) for reference in references))


def _similarity(one: str, other: str) -> float:
    return 1 - edit_distance(one, other) / max(len(one), len(other), 1)


def _plain(text: str) -> str:
    return strip_end(" ".join(text.lower().split()))


def _clean(text: str) -> str:
    if any(character.isdigit() for character in text):
        return strip_end(text).replace(",", "").replace("$", "")
    return strip_quotes(text)


def _relaxed(answer: str, reference: str) -> bool:
    """Both cleaned."""
    found, wanted = _number(answer), _number(reference)
    if found is not None and wanted is not None:
        shares = [(found / 100, wanted)] * _is_percentage(answer) + [(found, wanted / 100)] * _is_percentage(reference)
        return any(_close(one, other) for one, other in [(found, wanted), *shares])
    if answer and len(reference) == 1 and reference.isalpha():
        return answer[0].lower() == reference.lower()
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    return number_in(text.strip().rstrip("%"))


def _is_percentage(text: str) -> bool:
    return text.rstrip().endswith("%")


def _close(found: float, wanted: float) -> bool:
    return abs(found - wanted) / max(abs(wanted), 1e-10) <= NUMBER_TOLERANCE


def _patterns(reference: str) -> list[str]:
    """What in a text hints at the reference: its number, with commas and without, or usual phrases with it."""
    number = number_in(reference)
    if number is None:
        lower = reference.lower()
        return [f"is {lower}", f"was {lower}", f" {lower}.", f"are {lower}", f"\n\n{lower}"]
    whole = int(number) if number.is_integer() else number
    return [f"{whole:,}", str(whole)]


def _of(metric: Callable[[str, Sequence[str]], float]) -> Callable[[str, Example], float]:
    return lambda answer, example: metric(answer, example.references)


def _exact_choice(answer: str, example: Example) -> float:
    return official_metrics.exact_choice(answer, example.references, example.details.get("precision"))


def _mmmu(answer: str, example: Example) -> float:
    choices = example.details.get("choices", ())
    if not choices and "question_type" not in example.details and all(map(CHOICE_LETTER.fullmatch, example.references)):
        choices = [None] * (ord(max("E", *example.references)) - ord("A") + 1)  # a question of one's own, by letter
    return author_metrics.mmmu(answer, example.references, choices)


def _mathvista(answer: str, example: Example) -> float:
    details = example.details
    references = [details["answer"]] if "answer" in details else example.references
    choices, kind = details.get("choices", ()), details.get("answer_type", "")
    final = final_answer(answer) if details.get("final_answer") else "" if choices or kind else answer.strip()
    return author_metrics.mathvista(answer, references, choices, kind, details.get("precision"), final)


def _chartqa_relaxed(answer: str, example: Example) -> float:
    final = final_answer(answer) if example.details.get("final_answer") else ""
    return author_metrics.chartqa_relaxed(final or answer, example.references)


METRICS: dict[str, Callable[[str, Example], float]] = {
    "mistral_vqa_match": _of(mistral_vqa_match),
    "mistral_anls": _of(mistral_anls),
    "relaxed_correctness": _of(relaxed_correctness),
    "baseline": _of(baseline),
    "level_1": _of(level_1),
    "level_2": _of(level_2),
    "level_3": _of(level_3),
    "vqa_accuracy": _of(official_metrics.vqa_accuracy),
    "anls": _of(official_metrics.anls),
    "exact_choice": _exact_choice,
    "mmmu": _mmmu,
    "mathvista": _mathvista,
    "chartqa_relaxed": _chartqa_relaxed,
    "exact": _of(official_metrics.exact),
    "nats_per_token": text_metrics.nats_per_token,
    "bits_per_byte": text_metrics.bits_per_byte,
    "mmlu": _of(text_metrics.mmlu),
    "gsm8k_strict": _of(text_metrics.gsm8k_strict),
    "gsm8k_flexible": _of(text_metrics.gsm8k_flexible),
    "math_equivalent": _of(text_metrics.math_equivalent),
    "prompt_strict": text_metrics.prompt_strict,
    "instruction_strict": text_metrics.instruction_strict,
    "prompt_loose": text_metrics.prompt_loose,
    "instruction_loose": text_metrics.instruction_loose,
}

WEIGHTS: dict[str, Callable[[str, Example], float]] = {
    "nats_per_token": text_metrics.tokens_of,
    "bits_per_byte": text_metrics.bytes_of,
    "instruction_strict": text_metrics.instructions_of,
    "instruction_loose": text_metrics.instructions_of,
}
"""How much an example counts in a metric's mean; 1 where it is not here."""
LOSSES = frozenset({"nats_per_token", "bits_per_byte"})
"""Metrics of which less is better."""
OF_THEIR_TASK = LOSSES | {"prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"}
"""Metrics that need what only their own task knows."""
