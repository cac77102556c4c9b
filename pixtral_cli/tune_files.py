"""What `pixtral tune` writes and where, and settings asked what their files do not have."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.eval_files import image_cache
from pixtral_cli.job_progress import answer_requests, writing_to
from pixtral_cli.options import start_job

if TYPE_CHECKING:
    from pixtral_runtime.batch.records import Record, Request
    from pixtral_runtime.batch.run import Tally
    from pixtral_runtime.batch.worker import Worker
    from pixtral_runtime.bundle.device_catalog import KnownDevice
    from pixtral_runtime.evaluation.tuning import Afford
    from pixtral_runtime.evaluation.tuning_measured import Measured
    from pixtral_runtime.evaluation.tuning_run import Trial, TuneSetting

RESULT, MEASURED = "tune.json", "measured.json"
SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass
class TuneFiles:
    """A folder with a results file for each setting and the result, where one was named, and a page."""

    folder: Path | None
    html: Path | None
    resume: bool
    force: bool
    _begun: set[TuneSetting] = field(default_factory=set)
    _unwritten: dict[TuneSetting, dict[str, Record]] = field(default_factory=dict)

    @property
    def images(self) -> Path:
        """Where pictures go that rows hold as bytes."""
        return image_cache() if self.folder is None else self.folder / "images"

    @property
    def result(self) -> Path | None:
        return None if self.folder is None else self.folder / RESULT

    def records(self, setting: TuneSetting) -> Path | None:
        """Named after what decides the answers."""
        from pixtral_runtime.evaluation.tuning_run import setting_name

        return None if self.folder is None else self.folder / f"{setting_name(setting)}.jsonl"

    @cached_property
    def measured(self) -> Measured:
        """What no record has. Raises InputError."""
        from pixtral_runtime.evaluation.tuning_measured import Measured

        return Measured(None if self.folder is None else self.folder / MEASURED, resume=self.resume)

    def check(self, settings: Sequence[TuneSetting], inputs: Iterable[Path]) -> None:
        """Refuse what could not be written, before the work. Raises InputError, MachineError."""
        from pixtral_runtime.errors import Option
        from pixtral_runtime.files import Output, check_outputs

        to_folder, replaces = Option("output", "ANOTHER_FOLDER"), self.resume or self.force
        measured = None if self.folder is None else self.folder / MEASURED
        places = [*((path, to_folder) for path in (*map(self.records, settings), self.result, measured))]
        places.append((self.html, Option("html", "tune.html")))
        check_outputs(
            [Output(path, option, replaces, resumable=True) for path, option in places if path is not None], inputs
        )

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """An interruption between answers says how to go on as well, if there is something to go on with."""
        try:
            yield
        except KeyboardInterrupt as error:
            if error.args or not any(path is not None and path.exists() for path in map(self.records, self._begun)):
                raise
            raise KeyboardInterrupt(f"answers are kept in {self.folder}; add --resume to go on") from error

    def ask(self, bars: output.Bars, setting: TuneSetting, worker: Worker, asked: Sequence[Request]) -> Tally:
        """Answer what the setting's file does not have, or what was not asked before."""
        from pixtral_runtime.errors import Option

        path = self.records(setting)
        resume = self.resume or setting in self._begun
        self._begun.add(setting)
        known = self._unwritten.setdefault(setting, {})
        new = [request for request in asked if request.id not in known]
        with writing_to(Option("output", "ANOTHER_FOLDER")):
            tally = answer_requests(
                partial(start_job, worker), new, worker.settings, path, resume=resume, force=self.force, bars=bars
            )
        if path is None:
            known.update(tally.records)
            tally.records = known
        return tally


def batch_sizes(text: str) -> list[int]:
    """`1,4,8` as numbers. Raises InputError."""
    from pixtral_runtime.errors import InputError

    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word[:9]) > 0 and len(word) < 10):
            raise InputError(f"--batch {text}: {word!r} is no number from 1 on", "--batch 1,4,8")
    return sorted({int(word) for word in words})


def work_bound(text: str) -> Callable[[Trial], Afford]:
    """`500` as requests; `90s`, `30min` and `8h` as time from when it is applied. Raises InputError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.evaluation.tuning_run import within_requests, within_seconds

    found = re.fullmatch(r"([1-9][0-9]{0,8}) ?(s|min|h)?", text.strip(), re.ASCII)
    if found is None:
        raise InputError(f"--budget {text} is no number of requests and no time", "--budget 500", "--budget 30min")
    number, unit = int(found[1]), found[2]
    if unit is None:
        return partial(within_requests, most=number)
    return lambda trial: within_seconds(trial, time.monotonic() + number * SECONDS[unit])


def known_device(name: str | None) -> KnownDevice | None:
    """The device of this name. Raises InputError."""
    from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES
    from pixtral_runtime.errors import InputError

    if name is not None and name not in KNOWN_DEVICES:
        raise InputError(f"no device {name!r}", f"--device {'|'.join(KNOWN_DEVICES)}")
    return None if name is None else KNOWN_DEVICES[name]
