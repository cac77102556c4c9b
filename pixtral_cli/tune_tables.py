"""How `pixtral tune` shows its result on the terminal, and the line that it recommends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.options import typed_options

if TYPE_CHECKING:
    import typer

    from pixtral_runtime.evaluation.tuning_result import TuneResult
    from pixtral_runtime.evaluation.tuning_run import TuneSetting

SHOWN_ROWS = 8  # of a list on the terminal


def print_tuning(result: TuneResult, *, as_json: bool) -> None:
    """On stdout the settings and the line to type, on stderr what could not be asked."""
    from pixtral_runtime.evaluation.tuning_page import settings_header, settings_rows

    broken = result.trial.questions.broken
    if as_json:
        output.print_json(result.to_dict())
    else:
        output.print_table(settings_header(result), settings_rows(result))
        output.print_line(f"\n{result.verdict} (costs {result.costs})")
        if result.command is not None:
            output.print_line(result.command)
    if broken:
        output.warn(f"{len(broken)} rows could not be asked, and count nowhere")
    for row in broken[:SHOWN_ROWS]:
        output.error_line(f"{row.id}: {row.reason}")
    if unanswered := result.trial.unanswered:
        examples = len(result.trial.questions.examples)
        output.warn(f"{unanswered} of {examples} examples could not be answered, and count nowhere")


def line_to_type(context: typer.Context, setting: TuneSetting, images: Path, questions: Path, batch: int | None) -> str:
    """The command that runs a setting over the pictures, with the questions where every picture is asked the same.

    What decides answers and costs beside the setting is as it was while tuning: options that were typed, and greedy.
    """
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.evaluation.tuning_questions import is_rows
    from pixtral_runtime.generation.sampling import sampling_of
    from pixtral_runtime.inputs.text_file import read_lines

    words = ["pixtral", "run", str(setting.bundle), str(images)]
    if not is_rows(questions):
        words += [word for line in read_lines(questions) if line.strip() for word in ("-p", line.strip())]
    for parameter in ("preprocess", "max_new_tokens", "threads", "backend"):
        for option in typed_options(context, (parameter,)):
            words += [option, str(context.params[parameter])]
    if sampling_of(open_bundle(setting.bundle)).temperature:
        words += ["--temperature", "0"]
    if setting.image_tokens is not None:
        words += ["--image-tokens", str(setting.image_tokens)]
    if batch is not None:
        words += ["--batch", str(batch)]
    return shlex.join(words)
