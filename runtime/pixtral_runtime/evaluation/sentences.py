"""How many sentences a text has, and words in capitals, close to NLTK's way.

NLTK learnt abbreviations and beginnings of sentences from newspapers, and no package brings what it learnt. Here a few
dozen abbreviations are listed.
"""

from __future__ import annotations

import re

_KNOWN = """
    adm aug ave bros co col corp dec dr feb fri ft gen inc jan jr lt ltd maj mr mrs ms nov oct p ph.d prof rep sen
    sep sept sr st u.k u.n u.s v vs wed a.m p.m d.c a.d l.a n.y
"""
ABBREVIATIONS = frozenset(_KNOWN.split())
_BEGINNINGS = """
    a after all although an and another any are as at because before both but by despite during each even every few
    first for from he her here his how however if in indeed instead it its just last like many more most my neither
    no not now of on once one only other our perhaps she since so some such that the their there these they this
    those though thus to today two under unlike until we what when where whether which while who why with without
    yet you your
"""
BEGINNINGS = frozenset(_BEGINNINGS.split())  # of sentences, where a capital elsewhere would be unusual
_END = re.compile(r"""(?P<word>\S*?)(?P<mark>[.?!]+)(?=[)";}\]*:@'({\[]|\s+(?P<next>\S+))""")
_CLOSING = re.compile(r"""["')\]}]+(?=\s|--|$)""")
_MARKS = r"""["`;@#$%&?!()\[\]{}<>\u2018\u2019\u201c\u201d\xab\xbb]"""
_CLITICS = r"(?<=\w)(?='(?:s|m|d|ll|re|ve)\b)|(?<=\w)(?=n't\b)"
_SPLIT = re.compile(rf"\.{{3}}|--|[:,](?=\D|$)|{_MARKS}|\s+|{_CLITICS}", re.IGNORECASE)
_TWO_IN_ONE = ("CANNOT", "GIMME", "GONNA", "GOTTA", "LEMME", "WANNA")


def count_sentences(text: str) -> int:
    """Sentences end at `.`, `?` or `!` before white space or another mark.

    Not after an abbreviation, an initial or dots, unless a sentence may well begin there; nor after a number that a
    small letter follows.
    """
    ends = [found.end() for found in _END.finditer(text.strip()) if _is_end(found)]
    rest = (text.strip()[ends[-1] :] if ends else text).lstrip()
    if ends and (closing := _CLOSING.match(rest)):
        rest = rest[closing.end() :]
    return len(ends) + bool(rest.strip())


def capital_words(text: str) -> int:
    """Words without a small letter. Hyphens make one word of two, clitics such as `'S` two of one."""
    words = [word for word in _SPLIT.split(text) if word and word.isupper()]
    return len(words) + sum(word.strip("*_.'") in _TWO_IN_ONE for word in words)


def _is_end(found: re.Match[str]) -> bool:
    word, mark, following = found["word"], found["mark"], found["next"] or ""
    if not mark.endswith(".") or (mark != "." and mark.strip(".")):
        return True
    begins = following[:1].isupper() and following.strip(",.;:!?'\"").lower() in BEGINNINGS
    if mark != ".":
        return begins
    word = word.lstrip("(\"'[*\u201c\u2018").lower()
    if word.isdecimal():
        return not following[:1].islower()
    is_initial = len(word) == 1 and word.isalpha()
    return begins if is_initial or word in ABBREVIATIONS else True
