"""What `pixtral tune` writes and where, the budgets it was given, and settings asked what their files do not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.job_progress import answer_requests
from pixtral_cli.options import start_job

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Request
    from pixtral_runtime.batch.run import Tally
    from pixtral_runtime.batch.worker import Worker
    from pixtral_runtime.bundle.device_catalog import KnownDevice
    from pixtral_runtime.evaluation.tuning_run import TuneSetting

RESULT = "tune.json"


@dataclass
class TuneFiles:
    """A folder with a results file for each setting and the result, and a page beside it."""

    folder: Path
    html: Path | None
    resume: bool
    force: bool
    _begun: set[Path] = field(default_factory=set)

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    def records(self, setting: TuneSetting) -> Path:
        """Named after what decides the answers."""
        from pixtral_runtime.bundle.manifest import open_bundle

        opened = open_bundle(setting.bundle)
        return self.folder / f"{opened.path.resolve().name}-{opened.fingerprint[:8]}-{setting.tokens}.jsonl"

    def check(self, settings: Sequence[TuneSetting], inputs: Iterable[Path]) -> None:
        """Refuse what could not be written, before the work. Raises InputError, MachineError."""
        from pixtral_runtime.errors import Option
        from pixtral_runtime.files import Output, check_outputs

        to_folder, replaces = Option("output", "ANOTHER_FOLDER"), self.resume or self.force
        paths = [*map(self.records, settings), self.result]
        outputs = [Output(path, to_folder, replaces, resumable=True) for path in paths]
        if self.html is not None:
            outputs.append(Output(self.html, Option("html", "tune.html"), replaces, resumable=True))
        check_outputs(outputs, inputs)

    def ask(self, bars: output.Bars, setting: TuneSetting, worker: Worker, asked: Sequence[Request]) -> Tally:
        """Answer what the setting's file does not have."""
        path = self.records(setting)
        resume = self.resume or path in self._begun
        self._begun.add(path)
        return answer_requests(
            partial(start_job, worker), asked, worker.settings, path, resume=resume, force=self.force, bars=bars
        )


def token_budgets(text: str | None) -> list[int | None] | None:
    """`256,512,full` as numbers, None for all tokens; None for no text. Raises InputError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.preprocess import MIN_IMAGE_TOKENS

    if text is None:
        return None
    budgets: list[int | None] = []
    for word in map(str.strip, text.split(",")):
        is_number = word.isascii() and word.isdecimal() and len(word) < 10
        if word != "full" and not (is_number and int(word) >= MIN_IMAGE_TOKENS):
            raise InputError(
                f"--image-tokens {text}: {word!r} is no number from {MIN_IMAGE_TOKENS} on, nor 'full'",
                "--image-tokens 256,512,full",
            )
        budgets.append(None if word == "full" else int(word))
    return budgets


def known_device(name: str | None) -> KnownDevice | None:
    """The device of this name. Raises InputError."""
    from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES
    from pixtral_runtime.errors import InputError

    if name is not None and name not in KNOWN_DEVICES:
        raise InputError(f"no device {name!r}", f"--device {'|'.join(KNOWN_DEVICES)}")
    return None if name is None else KNOWN_DEVICES[name]
