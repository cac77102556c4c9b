"""The page of a tuning: score against cost with intervals, the settings, and the answers that changed."""

from __future__ import annotations

from pixtral_runtime.evaluation.page_parts import (
    POLICY,
    STYLE,
    Axes,
    ChangedAnswer,
    PlotPoint,
    changed_answers,
    score_plot,
)
from pixtral_runtime.evaluation.tuning import Interval, Standing
from pixtral_runtime.evaluation.tuning_result import TuneResult
from pixtral_runtime.html_page import CLOSING, escaped, facts, note, opening, table


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
                *_score_cells(standing, is_best=is_best),
                *(seconds(costs[batch]) if batch in costs else "" for batch in result.trial.batches),
                f"{standing.state} after {standing.asked}",
            )
        )
    return rows


def _score_cells(standing: Standing, *, is_best: bool) -> tuple[str, str, str, str]:
    """Score and difference, each with its interval; a line where no example tells."""
    score, difference = standing.score, standing.difference
    own = (f"{score.mean:.2%}", _bounds(score, "")) if score.n else ("-", "")
    if is_best:
        return *own, "the best" if score.n else "-", ""
    against = (f"{100 * difference.mean:+.2f}", _bounds(difference, "+")) if difference.n else ("-", "")
    return *own, *against


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
    """Score against cost, as an SVG element."""
    points = []
    for number, standing in enumerate(result.tuned.standings):
        score, chosen = standing.score, number == result.tuned.recommended
        title = f"{result.name(number)}: {score.mean:.2%}, {seconds(standing.cost)}"
        bounds = score.mean, score.low, score.high
        points.append(PlotPoint(standing.cost, *bounds, _label(result, number), title, standing.on_front, chosen))
    return score_plot(points, Axes("seconds a request", seconds))


def _label(result: TuneResult, number: int) -> str:
    setting = result.trial.settings[number]
    several = len(result.trial.bundles) > 1
    return f"{setting.bundle.name}, {setting.tokens}" if several else setting.tokens


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
    replies = result.trial.replies
    both = sum(key in replies[new] for key in replies[old])
    changes = [
        ChangedAnswer(
            change.example.images, change.example.question, change.example.references,
            change.old.answer or "", change.new.answer or "", change.new_score < change.old_score,
        )
        for change in result.changes(old, new)
    ]  # fmt: skip
    return changed_answers((result.name(old), result.name(new)), changes, both)


def _bounds(interval: Interval, sign: str) -> str:
    if sign:
        return f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"
    return f"{interval.low:.2%} to {interval.high:.2%}"
