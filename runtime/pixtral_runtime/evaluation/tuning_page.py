"""The page of a tuning: score against cost with intervals, the settings, and the answers that changed."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pixtral_runtime.batch.page import thumbnail
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.tuning import Interval
from pixtral_runtime.evaluation.tuning_result import Change, TuneResult
from pixtral_runtime.html_page import CLOSING, escaped, facts, note, opening, table
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


def tuning_page(result: TuneResult) -> str:
    """The whole HTML document."""
    tuned = result.tuned
    parts = [
        opening("pixtral tune", style=STYLE, policy=POLICY),
        f"<p><strong>{escaped(result.verdict)}.</strong></p>",
        f"<pre>{escaped(result.command)}</pre>" if result.command else "",
        facts(_summary(result)),
        "<h2>Score and cost</h2>",
        f"<figure>{plot(result)}</figure>",
        note(
            "Filled: no cheaper setting has its score. Bars: 95 % intervals, which hold in whatever round a setting "
            f"was stopped. Cost: seconds a request, {result.costs}."
        ),
        table(settings_header(result), settings_rows(result)),
    ]
    chosen = tuned.recommended
    if chosen is not None and chosen != tuned.best:
        parts.append(_changes(result, tuned.best, chosen))
    if chosen is not None and (cheaper := next_cheaper(result, chosen)) is not None:
        parts.append(_changes(result, chosen, cheaper))
    return "\n".join([*parts, CLOSING])


def settings_header(result: TuneResult) -> tuple[str, ...]:
    """A column of costs for each batch size."""
    batches = result.trial.batches
    costs = ["cost"] if batches == [1] else [f"cost, batch {batch}" for batch in batches]
    return "setting", "tokens a picture", "score", "95 % interval", "against the best", "95 % interval", *costs, ""


def settings_rows(result: TuneResult) -> list[tuple[str, ...]]:
    """The settings as cells of a table."""
    rows: list[tuple[str, ...]] = []
    for number, standing in enumerate(result.tuned.standings):
        is_best = number == result.tuned.best
        costs = result.trial.costs(number)
        rows.append(
            (
                result.name(number),
                f"{result.trial.image_tokens(number):.0f}",
                f"{standing.score.mean:.2%}",
                _bounds(standing.score, ""),
                "the best" if is_best else f"{100 * standing.difference.mean:+.2f}",
                "" if is_best else _bounds(standing.difference, "+"),
                *(seconds(costs[batch]) if batch in costs else "" for batch in result.trial.batches),
                f"{standing.state} after {standing.asked}",
            )
        )
    return rows


def next_cheaper(result: TuneResult, chosen: int) -> int | None:
    """The dearest of the settings that cost less."""
    standings = result.tuned.standings
    cheaper = [number for number, one in enumerate(standings) if (one.cost, number) < (standings[chosen].cost, chosen)]
    return max(cheaper, key=lambda number: (standings[number].cost, number), default=None)


def seconds(value: float) -> str:
    """`310 µs`, `3.1 ms`, `2.40 s`."""
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def plot(result: TuneResult) -> str:
    """Score against cost, on a scale of powers of two, as an SVG element that takes the page's colours."""
    standings = result.tuned.standings
    costs = [max(standing.cost, 1e-9) for standing in standings]
    least, most = math.log2(min(costs)), math.log2(max(costs))
    lowest = math.floor(5 * min(standing.score.low for standing in standings)) / 5

    def x(cost: float) -> float:
        share = (math.log2(max(cost, 1e-9)) - least) / (most - least) if most > least else 0.5
        return LEFT + 20 + share * (WIDTH - LEFT - RIGHT - 60)

    def y(score: float) -> float:
        return TOP + (1 - score) / max(1 - lowest, 0.2) * (HEIGHT - TOP - BOTTOM)

    drawn = [_axes(x, y, lowest, costs)]
    front = sorted((costs[number], one.score.mean) for number, one in enumerate(standings) if one.on_front)
    drawn.append(
        f'<polyline class="step" points="{" ".join(f"{x(cost):.1f},{y(score):.1f}" for cost, score in front)}"/>'
    )
    for rank, number in enumerate(sorted(range(len(standings)), key=lambda one: costs[one])):
        drawn.append(_point(result, number, x(costs[number]), y, label_below=bool(rank % 2)))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="score against cost">' + "".join(drawn) + "</svg>"
    )


def _point(result: TuneResult, number: int, x: float, y: Place, *, label_below: bool) -> str:
    standing = result.tuned.standings[number]
    score, middle = standing.score, y(standing.score.mean)
    label_y = middle + (16 if label_below else -7)
    kind = " chosen" if number == result.tuned.recommended else " front" if standing.on_front else ""
    return (
        f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y(score.low):.1f}" y2="{y(score.high):.1f}"/>'
        f'<circle class="dot{kind}" cx="{x:.1f}" cy="{middle:.1f}" r="5">'
        f"<title>{escaped(result.name(number))}: {score.mean:.2%}, {seconds(standing.cost)}</title></circle>"
        f'<text class="name" x="{x + 9:.1f}" y="{label_y:.1f}">{_label(result, number)}</text>'
    )


def _axes(x: Place, y: Place, lowest: float, costs: Sequence[float]) -> str:
    lines = []
    for step in range(5):
        score = lowest + step * (1 - lowest) / 4
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(score):.1f}" y2="{y(score):.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(score) + 4:.1f}" text-anchor="end">{score:.0%}</text>')
    for cost in sorted({min(costs), math.sqrt(min(costs) * max(costs)), max(costs)}):
        lines.append(f'<text x="{x(cost):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{seconds(cost)}</text>')
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">seconds a request</text>')
    return "".join(lines)


def _label(result: TuneResult, number: int) -> str:
    setting = result.trial.settings[number]
    several = len(result.trial.bundles) > 1
    return escaped(f"{setting.bundle.name}, {setting.tokens}" if several else setting.tokens)


def _summary(result: TuneResult) -> dict[str, object]:
    data = result.to_dict()
    share = data["share_of_full_cost"]
    return {
        "examples": data["examples"],
        "requests": data["requests"],
        "of the full grid's cost": "-" if share is None else f"{share:.0%}",
        "metric": data["metric"],
        "judged by": data["judged_by"],
        "tolerance, points": f"{100 * result.tolerance:g}",
        "costs": result.costs,
    }


def _changes(result: TuneResult, old: int, new: int) -> str:
    changes = result.changes(old, new)
    names = result.name(old), result.name(new)
    both = sum(key in result.trial.replies[new] for key in result.trial.replies[old])
    heading = f"<h2>{escaped(f'What changes from {names[0]} to {names[1]}')}</h2>"
    said = f"{len(changes)} of {both} examples that both answered have another score"
    shown = f"; the first {MOST_CHANGES} are here" if len(changes) > MOST_CHANGES else ""
    rows = "\n".join(map(_change, changes[:MOST_CHANGES]))
    head = "".join(f"<th>{escaped(name)}" for name in ("picture", "question", "wanted", *names))
    body = f'<div class="wide"><table class="changes"><tr>{head}\n{rows}\n</table></div>' if changes else ""
    return "\n".join((heading, note(f"{said}{shown}."), body))


def _change(change: Change) -> str:
    worse = change.new_score < change.old_score
    pictures = "".join(map(_picture, change.example.images))
    wanted = " | ".join(dict.fromkeys(change.example.references)) or "-"
    texts = (change.example.question, wanted, change.old.answer or "")
    cells = "".join(f'<td class="text">{escaped(text)}' for text in texts)
    return f'<tr><td>{pictures}{cells}<td class="{"lost" if worse else "text"}">{escaped(change.new.answer or "")}'


def _picture(path: Path) -> str:
    try:
        small = thumbnail(read_image_file(path))
    except (InputError, OSError):
        small = None
    if small is None:
        return escaped(path.name)
    return f'<img alt="{escaped(path.name)}" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">'


def _bounds(interval: Interval, sign: str) -> str:
    if sign:
        return f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"
    return f"{interval.low:.2%} to {interval.high:.2%}"
