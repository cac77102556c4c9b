"""The page of a curve: score against image tokens with intervals, the budgets, and the answers that changed."""

from __future__ import annotations

from pathlib import Path

from pixtral_runtime.evaluation.comparison import Flip, ScoreComparison
from pixtral_runtime.evaluation.curve import Curve, CurvePoint, compared
from pixtral_runtime.evaluation.page_parts import (
    POLICY,
    STYLE,
    Axes,
    ChangedAnswer,
    PlotPoint,
    changed_answers,
    score_plot,
)
from pixtral_runtime.evaluation.score import Score
from pixtral_runtime.html_page import CLOSING, bullets, facts, note, opening, table

BEST_RATING = 10.0  # of a judge
SHOWN = ("fingerprint", "precision", "dtype", "dataset", "split", "max_image_side", "judge", "backend")
CHANGE_HEADER = ("change", "95 % interval", "p", "better", "worse")


def curve_page(curve: Curve) -> str:
    """The whole HTML document."""
    setting = curve.points[-1].evaluation.setting
    parts = [
        opening(f"{curve.task}: {setting['bundle']}", style=STYLE, policy=POLICY),
        facts({name: setting[name] for name in SHOWN if setting[name]}),
        "<h2>Score and image tokens</h2>",
        _plot(curve),
        table(curve_header(curve), curve_rows(curve)),
    ]
    if curve.against is not None:
        parts += ["<h2>Against the other, budget by budget</h2>", note(curve.against)]
        parts += [table(("image tokens", *CHANGE_HEADER), against_rows(curve)), bullets(against_verdicts(curve))]
    for fewer, more in reversed(list(zip(curve.points, curve.points[1:], strict=False))):
        parts.append(_changes(more, fewer))
    return "\n".join([*parts, CLOSING])


def curve_header(curve: Curve) -> tuple[str, ...]:
    """What the columns of `curve_rows` are."""
    against = f"against {curve.points[-1].name}"
    return (
        "image tokens",
        "tokens a picture",
        curve.headline,
        "95 % interval",
        "examples",
        against,
        *CHANGE_HEADER[1:],
    )


def curve_rows(curve: Curve) -> list[tuple[str, ...]]:
    """The points as cells of a table."""
    rows = []
    for point in curve.points:
        tokens, score = point.mean_image_tokens, point.evaluation.headline_score
        shown = ("-", "-", "0") if score is None else (*score_cells(score, is_share=curve.is_share), str(score.n))
        change = _change_cells(curve, point.comparison)
        rows.append((point.name, "-" if tokens is None else f"{tokens:.0f}", *shown, *change))
    return rows


def against_rows(curve: Curve) -> list[tuple[str, ...]]:
    """Each budget beside the other bundle's as cells of a table."""
    return [(point.name, *_change_cells(curve, point.against)) for point in curve.points]


def against_verdicts(curve: Curve) -> list[str]:
    """What to make of each difference, for people."""
    return [f"{point.name}: {point.against.verdict}" for point in curve.points if point.against is not None]


def score_cells(score: Score, *, is_share: bool) -> tuple[str, str]:
    """A score, and its interval."""
    if is_share:
        return f"{score.mean:.2%}", f"{score.low:.2%} to {score.high:.2%}" if score.has_interval else ""
    return f"{score.mean:.2f}", f"{score.low:.2f} to {score.high:.2f}" if score.has_interval else ""


def _change_cells(curve: Curve, comparison: ScoreComparison | None) -> tuple[str, ...]:
    if comparison is None:
        return ("",) * len(CHANGE_HEADER)
    change = next(iter(comparison.changes.values()))
    scale = 100 if curve.is_share else 1
    bounds = f"{scale * change.low:+.2f} to {scale * change.high:+.2f}" if change.has_interval else ""
    return f"{scale * change.difference:+.2f}", bounds, f"{change.p_value:.2g}", str(change.better), str(change.worse)


def _plot(curve: Curve) -> str:
    points = []
    for point in curve.points:
        score, tokens = point.evaluation.headline_score, point.mean_image_tokens
        if score is not None and tokens:
            said, interval = score_cells(score, is_share=curve.is_share)
            title = f"{point.name} image tokens, {tokens:.0f} a picture: {said} ({interval})"
            points.append(PlotPoint(tokens, score.mean, score.low, score.high, point.name, title))
    if not points:
        return note("Nothing was scored.")
    axes = Axes("mean tokens a picture", "{:.0f}".format, 1.0 if curve.is_share else BEST_RATING)
    bars = note("Bars: 95 % intervals of each budget alone. Differences are paired, and so surer than the bars look.")
    return f"<figure>{score_plot(points, axes)}</figure>\n{bars}"


def _changes(more: CurvePoint, fewer: CurvePoint) -> str:
    """The answers whose score is another one with fewer tokens, losses first."""
    comparison = compared(more.evaluation, fewer.evaluation)
    flips = [] if comparison is None else sorted(comparison.flips, key=lambda flip: flip.new_score - flip.old_score)
    both = 0 if comparison is None else next(iter(comparison.changes.values())).n
    names = f"{more.name} image tokens", f"{fewer.name} image tokens"
    return changed_answers(names, [_changed(flip, fewer) for flip in flips], both, "have another score")


def _changed(flip: Flip, point: CurvePoint) -> ChangedAnswer:
    pictures = [Path(image.path) for image in point.records[flip.id].images]
    is_worse = flip.new_score < flip.old_score
    return ChangedAnswer(pictures, flip.question, flip.references, flip.old_answer, flip.new_answer, is_worse)
