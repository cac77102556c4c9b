"""`pixtral eval` with several budgets of image tokens: a result for each, and the curve that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.eval_files import Files, evaluate_bundle
from pixtral_cli.eval_tables import print_missing

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Record
    from pixtral_runtime.evaluation.curve import Curve
    from pixtral_runtime.evaluation.result import Evaluation
    from pixtral_runtime.evaluation.run import EvaluationOptions, Questions

Budgets = Sequence[int | None]


def answer_with_budgets(
    bundle: Path, questions: Questions, options: EvaluationOptions, budgets: Budgets, files: Files
) -> list[tuple[Evaluation, Mapping[str, Record]]]:
    """Answer, score and save with each budget, in the order of the budgets; the model is loaded once.

    The most tokens come first: what the context does not hold is refused before the hours that the others may take.
    """
    from pixtral_runtime.evaluation.curve import budget_name
    from pixtral_runtime.evaluation.shared_workers import SharedWorkers

    workers = SharedWorkers(options.worker)
    answered: list[tuple[Evaluation, Mapping[str, Record]]] = []
    begun: list[Files] = []
    try:
        for budget in reversed(budgets):
            output.talk(f"{bundle} with {budget_name(budget)} image tokens")
            begun.append(files.of_budget(budget))
            asked = replace(options, image_tokens=budget)
            answered.insert(0, evaluate_bundle(bundle, questions, asked, begun[-1], workers))
    except KeyboardInterrupt as error:
        if error.args or not any(one.answers is not None and one.answers.exists() for one in begun):
            raise
        raise KeyboardInterrupt(f"answers are kept beside {files.save}; add --resume to go on") from error
    return answered


def evaluate_curve(
    bundle: Path,
    questions: Questions,
    options: EvaluationOptions,
    budgets: Budgets,
    files: Files,
    *,
    against: Path | None,
    old: Sequence[Evaluation],
) -> Curve:
    """The bundle's curve, saved; beside the `old` results at the same budgets, or the bundle at `against`."""
    from pixtral_runtime.evaluation.curve import Curve

    answered = answer_with_budgets(bundle, questions, options, budgets, files)
    if against is not None and not old:
        others = answer_with_budgets(against, questions, options, budgets, files.of_reference())
        old = [evaluation for evaluation, _ in others]
        if (place := files.of_reference().save) is not None:
            Curve.of(budgets, others).save(place)
    curve = Curve.of(budgets, answered, old, None if against is None else str(against))
    if files.save is not None:
        curve.save(files.save)
    return curve


def print_curve(curve: Curve, *, as_json: bool) -> None:
    """On stdout the curve, on stderr what has no score."""
    from pixtral_runtime.evaluation.curve_page import (
        CHANGE_HEADER,
        against_rows,
        against_verdicts,
        curve_header,
        curve_rows,
    )

    if as_json:
        output.print_json(curve.to_dict())
    else:
        output.print_table(curve_header(curve), curve_rows(curve))
        if curve.against is not None:
            output.print_table(("against the other with", *CHANGE_HEADER), against_rows(curve))
            output.print_line("")
            for line in against_verdicts(curve):
                output.print_line(line)
    for point in curve.points:
        for other, comparison in ((f"{curve.points[-1].name} tokens", point.comparison), ("the other", point.against)):
            if comparison is not None and comparison.unpaired:
                only = f"{comparison.unpaired} examples were scored for {point.name} tokens or for {other} only"
                output.warn(f"{only}, and are not compared")
    print_missing({f"with {point.name} image tokens ": point.evaluation for point in curve.points})
