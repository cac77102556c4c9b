"""HTML pages in one file that loads nothing else: what reports, benchmarks and comparisons are written with.

A page is `opening`, a body and `CLOSING`. Text from outside passes through `escaped`, `facts`, `bullets`, `note` or
`table`, which escape it; a template is filled in one pass, so that text which looks like a place stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

QUIET = "default-src 'none'; style-src 'unsafe-inline'"
"""The content security policy of a page without pictures and scripts."""
CLOSING = "</html>\n"

_OPENING = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
{{style}}</style>
<h1>{{title}}</h1>
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table with a class of `page.css`: number, text or soft."""

    text: str
    kind: str


def opening(title: str, *, style: str = "", policy: str = QUIET) -> str:
    """The page up to its heading. `style` is CSS beside that of all pages."""
    shared = files("pixtral_runtime").joinpath("page.css").read_text(encoding="utf-8")
    return fill(_OPENING, {"policy": policy, "title": escaped(title), "style": shared + style})


def fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with each `{{name}}` replaced by its part. Raises KeyError for a place that has none."""
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)


def escaped(value: object) -> str:
    """Anything as text of a page."""
    return escape(str(value))


def facts(values: Mapping[str, object]) -> str:
    """Names and values, side by side."""
    pairs = "".join(f"<div><dt>{escaped(name)}<dd>{escaped(value)}</div>" for name, value in values.items())
    return f"<dl>{pairs}</dl>"


def bullets(lines: Iterable[str]) -> str:
    """A list; nothing if there are no lines."""
    items = "".join(f"<li>{escaped(line)}" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def note(line: str) -> str:
    """A paragraph that explains what follows."""
    return f'<p class="note">{escaped(line)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """A table that scrolls by itself where it is wide. `header` may be empty."""
    head = f"<tr>{''.join(f'<th>{escaped(name)}' for name in header)}\n" if header else ""
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}" for row in rows)
    return f'<div class="wide"><table>\n{head}{body}\n</table></div>'


def _cell(cell: str | Cell) -> str:
    return f"<td>{escaped(cell)}" if isinstance(cell, str) else f'<td class="{cell.kind}">{escaped(cell.text)}'
