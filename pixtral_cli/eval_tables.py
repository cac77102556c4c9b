"""How `pixtral eval` shows a result: a table on the terminal, and a page with pictures and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Record
    from pixtral_runtime.evaluation.comparison import ScoreComparison
    from pixtral_runtime.evaluation.result import Evaluation
    from pixtral_runtime.evaluation.score import Score

DIGITS = 4  # of ratings and nats
SHOWN_ROWS = 8  # rows of a list on the terminal; all of them are in the file and on the page


def print_evaluation(evaluation: Evaluation, comparison: ScoreComparison | None, *, as_json: bool) -> None:
    """On stdout the scores and the comparison, on stderr what has no score."""
    if as_json:
        compared = None if comparison is None else comparison.to_dict()
        output.print_json(evaluation.summary() | {"comparison": compared})
    else:
        _print_tables(evaluation, comparison)
    print_missing({"": evaluation})


def print_missing(evaluations: Mapping[str, Evaluation]) -> None:
    """On stderr how many examples have no score in each evaluation, by what it is called, and each reason once."""
    for name, evaluation in evaluations.items():
        if evaluation.missing:
            scored = f"{len(evaluation.scored)} of {evaluation.rows} examples were scored"
            output.warn(f"{name}{scored}; the others count nowhere")
    missing = list(dict.fromkeys(pair for evaluation in evaluations.values() for pair in evaluation.missing))
    for name, reason in missing[:SHOWN_ROWS]:
        output.error_line(f"{name}: {reason}")
    if len(missing) > SHOWN_ROWS:
        output.talk(f"and {len(missing) - SHOWN_ROWS} more: --save FILE.json lists them")


def _print_tables(evaluation: Evaluation, comparison: ScoreComparison | None) -> None:
    share = evaluation.is_share
    rows = [(name, *_cells(score, share)) for name, score in evaluation.scores.items()]
    output.print_table((evaluation.task, "score", "95 % interval", "examples"), rows)
    if groups := evaluation.groups:
        rows = [(name or "-", *_cells(score, share)) for name, score in groups.items()]
        output.print_table((f"{evaluation.headline} by group", "score", "95 % interval", "examples"), rows)
    if averages := evaluation.averages:
        shown = [(name, f"{value:.2%}" if share else f"{value:.2f}") for name, value in averages.items()]
        output.print_table(("average", "score" if share else "rating"), shown)
    if comparison is None:
        return
    scale, unit, digits = (100, " points", 2) if share else (1, "", DIGITS)
    output.print_table(
        ("against the other", "change", "95 % interval", "p", "better", "worse", "test"),
        [
            (
                name, f"{scale * c.difference:+.{digits}f}{unit}",
                f"{scale * c.low:+.{digits}f} to {scale * c.high:+.{digits}f}" if c.has_interval else "",
                f"{c.p_value:.2g}", str(c.better), str(c.worse), c.test,
            )
            for name, c in comparison.changes.items()
        ],
    )  # fmt: skip
    if comparison.flips and all(flip.references for flip in comparison.flips):
        output.print_table(
            ("flipped", "reference", "other", "this"),
            [
                (flip.id, _short(flip.references[0]), _short(flip.old_answer), _short(flip.new_answer))
                for flip in comparison.flips[:SHOWN_ROWS]
            ],
        )
    if comparison.unpaired:
        output.warn(f"{comparison.unpaired} examples were scored for one of the two only and are not compared")
    output.print_line(f"\n{comparison.verdict}")


def write_page(
    path: Path, evaluation: Evaluation, comparison: ScoreComparison | None, records: Mapping[str, Record]
) -> None:
    """The page: errors, flipped and wrong examples first, at most `MOST_EXAMPLES` examples."""
    from pixtral_runtime.batch.page import write_report
    from pixtral_runtime.evaluation.page import MOST_EXAMPLES, evaluation_page

    shown, notes, summary = evaluation_page(evaluation, comparison, records)
    title = f"{evaluation.task}: {evaluation.setting['bundle']}"
    with output.progress() as bars:
        write_report(
            shown, path, title=title, summary=summary, notes=notes,
            progress=lambda done: bars.stage("page", done, len(shown)),
        )  # fmt: skip
    output.talk(
        f"the page is {path}"
        + (f", with {MOST_EXAMPLES} of {len(records)} examples" if len(records) > MOST_EXAMPLES else "")
    )


def _cells(score: Score, share: bool) -> tuple[str, str, str]:
    mean, low, high = (f"{x:.2%}" if share else f"{x:.{DIGITS}f}" for x in (score.mean, score.low, score.high))
    return mean, f"{low} to {high}" if score.has_interval else "", str(score.n)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 32 else line[:31] + "…"
