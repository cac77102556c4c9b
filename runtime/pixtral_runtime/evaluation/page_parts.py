"""What pages about budgets of image tokens have in common: a plot of scores, and tables of answers that changed."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.batch.page import thumbnail
from pixtral_runtime.errors import InputError
from pixtral_runtime.html_page import escaped, note
from pixtral_runtime.inputs.image_files import read_image_file

MOST_CHANGES = 50  # of each comparison
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; min-width: 36rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .axis { stroke: var(--line); }
svg .bar { stroke: var(--mark); stroke-width: 1.5; }
svg .dot { fill: var(--back); stroke: var(--mark); stroke-width: 2; }
svg .front { fill: var(--mark); } svg .step { fill: none; stroke: var(--mark); stroke-dasharray: 4 4; opacity: .6; }
svg .chosen { fill: var(--mark2); stroke: var(--mark2); } svg text.name { fill: var(--ink); }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; }
td img { max-width: 160px; height: auto; display: block; } td.lost { color: var(--bad); }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 60, 30, 24, 50  # of the plot, and around its axes, in pixels

Place = Callable[[float], float]
"""Where a value lies along an axis, in pixels."""


@dataclass(frozen=True)
class PlotPoint:
    """A score with its interval, at a cost of any unit. `on_line`: the dashed line goes through it."""

    cost: float
    mean: float
    low: float
    high: float
    label: str
    title: str
    on_line: bool = True
    is_chosen: bool = False


@dataclass(frozen=True)
class Axes:
    """What costs are, how they are written, and the best score: 1 where scores are shares."""

    cost_name: str
    cost_text: Callable[[float], str]
    best: float = 1.0

    def score_text(self, score: float) -> str:
        return f"{score:.0%}" if self.best == 1 else f"{score:.1f}"


def score_plot(points: Sequence[PlotPoint], axes: Axes) -> str:
    """Scores against costs, on a scale of powers of two, as an SVG element that takes the page's colours."""
    costs = [max(point.cost, 1e-9) for point in points]
    least, most = math.log2(min(costs)), math.log2(max(costs))
    lowest = math.floor(5 * min(point.low for point in points) / axes.best) / 5 * axes.best

    def x(cost: float) -> float:
        share = (math.log2(max(cost, 1e-9)) - least) / (most - least) if most > least else 0.5
        return LEFT + 20 + share * (WIDTH - LEFT - RIGHT - 60)

    def y(score: float) -> float:
        return TOP + (axes.best - score) / max(axes.best - lowest, 0.2 * axes.best) * (HEIGHT - TOP - BOTTOM)

    drawn = [_axes(x, y, lowest, costs, axes)]
    line = sorted((point.cost, point.mean) for point in points if point.on_line)
    drawn.append(
        f'<polyline class="step" points="{" ".join(f"{x(cost):.1f},{y(score):.1f}" for cost, score in line)}"/>'
    )
    for rank, point in enumerate(sorted(points, key=lambda one: one.cost)):
        drawn.append(_dot(point, x, y, label_below=bool(rank % 2)))
    label = f"score against {axes.cost_name}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(label)}">{"".join(drawn)}</svg>'


def _dot(point: PlotPoint, x: Place, y: Place, *, label_below: bool) -> str:
    across, middle = x(point.cost), y(point.mean)
    label_y = middle + (16 if label_below else -7)
    kind = " chosen" if point.is_chosen else " front" if point.on_line else ""
    return (
        f'<line class="bar" x1="{across:.1f}" x2="{across:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>'
        f'<circle class="dot{kind}" cx="{across:.1f}" cy="{middle:.1f}" r="5"><title>{escaped(point.title)}</title>'
        f'</circle><text class="name" x="{across + 9:.1f}" y="{label_y:.1f}">{escaped(point.label)}</text>'
    )


def _axes(x: Place, y: Place, lowest: float, costs: Sequence[float], axes: Axes) -> str:
    lines = []
    for step in range(5):
        score = lowest + step * (axes.best - lowest) / 4
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(score):.1f}" y2="{y(score):.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(score) + 4:.1f}" text-anchor="end">{axes.score_text(score)}</text>')
    for cost in sorted({min(costs), math.sqrt(min(costs) * max(costs)), max(costs)}):
        text = escaped(axes.cost_text(cost))
        lines.append(f'<text x="{x(cost):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{text}</text>')
    name = escaped(axes.cost_name)
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{name}</text>')
    return "".join(lines)


@dataclass(frozen=True)
class ChangedAnswer:
    """A question whose answer has another score; `pictures` are the files that it is about."""

    pictures: Sequence[Path]
    question: str
    references: Sequence[str]
    old_answer: str
    new_answer: str
    is_worse: bool


def changed_answers(names: tuple[str, str], changes: Sequence[ChangedAnswer], both: int, verb: str = "changed") -> str:
    """What changes from the first of two names to the second, over examples that `both` answered: the first ones.

    `verb` says what the changes have in common.
    """
    heading = f"<h2>{escaped(f'What changes from {names[0]} to {names[1]}')}</h2>"
    said = f"{len(changes)} of {both} examples that both answered {verb}"
    shown = f"; the first {MOST_CHANGES} are here" if len(changes) > MOST_CHANGES else ""
    rows = "\n".join(map(_change, changes[:MOST_CHANGES]))
    head = "".join(f"<th>{escaped(name)}" for name in ("picture", "question", "wanted", *names))
    body = f'<div class="wide"><table class="changes"><tr>{head}\n{rows}\n</table></div>' if changes else ""
    return "\n".join((heading, note(f"{said}{shown}."), body))


def _change(change: ChangedAnswer) -> str:
    pictures = "".join(map(_picture, change.pictures))
    wanted = " | ".join(dict.fromkeys(change.references)) or "-"
    cells = "".join(f'<td class="text">{escaped(text)}' for text in (change.question, wanted, change.old_answer))
    return f'<tr><td>{pictures}{cells}<td class="{"lost" if change.is_worse else "text"}">{escaped(change.new_answer)}'


def _picture(path: Path) -> str:
    try:
        small = thumbnail(read_image_file(path))
    except (InputError, OSError):
        small = None
    if small is None:
        return escaped(path.name)
    return f'<img alt="{escaped(path.name)}" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">'
