"""Formulas as MATH has them: the one in the last box of a solution, and whether two are the same but for typesetting.

It decides by the text alone, as the benchmark's authors do: 1/2, 0.5 and \\frac12 are the same, 2/4 is another.
"""

from __future__ import annotations

from collections.abc import Iterator

_DROPPED = ("\n", "\\!")
_REPLACED = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_MARKS = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")  # sizes of brackets, degrees, dollars
_UNIT = "\\text{ "


def boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` of a text holds, or `\\boxed …` up to a dollar; None where there is none."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    _, mark, rest = text.rpartition("\\boxed")
    if not mark or not rest.startswith("{"):
        return None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place]
    return None


def same_formula(one: str, other: str) -> bool:
    """Whether two formulas are the same, or the same text where one cannot be read."""
    try:
        return normalized(one) == normalized(other)
    except ValueError:
        return one == other


def normalized(formula: str) -> str:
    """A formula without what is typesetting only. Raises ValueError where a root or a fraction is of nothing."""
    for mark in _DROPPED:
        formula = formula.replace(mark, "")
    for mark, instead in _REPLACED:
        formula = formula.replace(mark, instead)
    for mark in _MARKS:
        formula = formula.replace(mark, "")
    formula = _without_unit(formula).replace("\\%", "").replace("%", "")
    formula = formula.replace(" .", " 0.").replace("{.", "{0.")
    if formula.startswith("."):
        formula = f"0{formula}"
    name, equals, value = formula.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # "x = 3"
        formula = value
    formula = _with_braces(_roots(formula).replace(" ", ""))
    return _slashed("\\frac{1}{2}" if formula == "0.5" else formula)


def _without_unit(formula: str) -> str:
    """Raises ValueError where there are several: then it is no unit."""
    if formula.count(_UNIT) > 1:
        raise ValueError(f"{formula!r} has several texts")
    return formula.partition(_UNIT)[0]


def _roots(formula: str) -> str:
    """`\\sqrt3` is `\\sqrt{3}`."""
    first, *rest = formula.split("\\sqrt")
    return first + "".join(f"\\sqrt{_braced(part, 1)}" for part in rest)


def _with_braces(formula: str) -> str:
    """`\\frac12` is `\\frac{1}{2}`, and `\\frac1{72}` is `\\frac{1}{72}`."""
    first, *rest = formula.split("\\frac")
    whole = first
    for part in rest:
        if len(part) == 1 and part != "{":  # half a fraction: the authors leave such a formula as it is
            return formula
        whole += f"\\frac{_braced(part, 2)}"
    return whole


def _braced(part: str, count: int) -> str:
    """What follows a command, its arguments in braces; where the first is, the others are left. Raises ValueError."""
    if not part:
        raise ValueError("a command without what it is of")
    if part.startswith("{"):
        return part
    return "".join(_arguments(part, count))


def _arguments(part: str, count: int) -> Iterator[str]:
    for place in range(count):
        if part[place] == "{":
            yield part[place:]
            return
        yield f"{{{part[place]}}}"
    yield part[count:]


def _slashed(formula: str) -> str:
    """`1/2` is `\\frac{1}{2}` where both are whole numbers."""
    above, _, below = formula.partition("/")
    try:
        is_plain = formula == f"{int(above)}/{int(below)}"
    except ValueError:
        return formula
    return f"\\frac{{{above}}}{{{below}}}" if is_plain else formula
