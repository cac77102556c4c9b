"""JSON that is nested more deeply than Python reads is bad input wherever it stands, and no bug of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.places import DEMO
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.quantization.samples import calibration_requests
from pixtral_runtime.batch.request_file import read_request_file
from pixtral_runtime.bench.report import read_report
from pixtral_runtime.bundle.manifest import MANIFEST, open_bundle
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.fields import read_dataset_json
from pixtral_runtime.evaluation.result import read_evaluation

DEEP = "[" * 200_000


def _manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text(DEEP)
    open_bundle(folder)


def _configuration(folder: Path) -> None:
    shutil.copytree(DEMO, folder / "c")
    (folder / "c" / "params.json").write_text(DEEP)
    open_checkpoint(folder / "c")


def _header(folder: Path) -> None:
    shutil.copytree(DEMO, folder / "c")
    (folder / "c" / "consolidated.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    open_checkpoint(folder / "c")


def _file(read: Callable[[Path], object]) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        (folder / "deep.json").write_text(DEEP)
        read(folder / "deep.json")

    return call


READERS: dict[str, Callable[[Path], None]] = {
    "manifest": _manifest,
    "configuration": _configuration,
    "safetensors header": _header,
    "requests": _file(lambda path: read_request_file(path, max_new_tokens=1)),
    "calibration": _file(calibration_requests),
    "dataset": _file(read_dataset_json),
    "report of a benchmark": _file(read_report),
    "result of an evaluation": _file(read_evaluation),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_deep_json_is_refused(reader: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recursion"):
        reader(tmp_path)
