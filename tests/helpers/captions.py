"""A job that answers at once, and a run of it with sidecars that may be killed at any function call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.results import SETTINGS, answered
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.run import run_job
from pixtral_runtime.batch.shards import share_of
from pixtral_runtime.batch.sidecars import Sidecars, SidecarSettings, sidecar_places
from pixtral_runtime.inputs.image_files import images_and_folders

SKIP = SidecarSettings()


class AnsweringJob:
    """Answers each request that has no record of the same picture with its name, unless `answers` has another one."""

    def __init__(
        self, requests: Sequence[Request], done: Mapping[str, Record], answers: Mapping[str, Record | str]
    ) -> None:
        self._requests, self._done, self._answers = requests, dict(done), answers
        self.kept, self.idle_s = 0, 0.0
        self.asked: list[str] = []
        self.order = [request.id for request in requests]

    def stop(self) -> None:
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        for request in self._requests:
            picture = request.images[0]
            assert isinstance(picture, Path)
            answer = self._answers.get(request.id, f"a caption\nof {picture.stem}")
            record = answer if isinstance(answer, Record) else answered(request, answer)
            record.key = picture.read_text()
            before = self._done.get(request.id)
            if before is not None and before.key == record.key:
                self.kept += 1
                continue
            self.asked.append(request.id)
            yield record


def caption(
    results: Path | None,
    settings: SidecarSettings = SKIP,
    sources: Sequence[str] = ("photos",),
    answers: Mapping[str, Record | str] = {},
    shard: tuple[int, int] = (1, 1),
) -> tuple[list[str], Sidecars]:
    """Caption pictures, going on with results that are there; what was asked, and the sidecars."""
    folders = images_and_folders(sources, recursive=True)
    requests = requests_of_images(folders, ["What?"], None, 8)
    sidecars = Sidecars(settings, sidecar_places(requests, settings, folders))
    done = read_results(results).records if results is not None and results.exists() else {}
    asked = sidecars.left_to_ask(share_of(requests, *shard), done)
    if results is None:
        job: Any = AnsweringJob(asked, {}, answers)
        run_job(job, len(asked), None, sidecars=sidecars)
        return job.asked, sidecars
    with ResultsFile.resume(results, asked, SETTINGS) as file:
        job = AnsweringJob(asked, file.done, answers)
        run_job(job, len(asked), file, sidecars=sidecars)
    return job.asked, sidecars


def caption_and_die(folder: Path, settings: SidecarSettings, calls: int) -> None:
    """As `caption`, killed at this function call."""
    os.chdir(folder)
    left = calls

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    caption(Path("results.jsonl"), settings)
    sys.setprofile(None)


def calls_of(folder: Path, settings: SidecarSettings) -> int:
    """How many function calls an undisturbed run has, which this does."""
    here, calls = Path.cwd(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    os.chdir(folder)
    sys.setprofile(count)
    try:
        caption(Path("results.jsonl"), settings)
    finally:
        sys.setprofile(None)
        os.chdir(here)
    return calls
