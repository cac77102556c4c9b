"""Names that no file can have, and files that the system does not read, for everything that reads files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pixtral_engines.build import _load_timing_cache
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.quantization.samples import calibration_requests
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.request_file import read_request_file
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.bench.report import read_report
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.compare.compare import read_prompts
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.dataset import read_rows
from pixtral_runtime.evaluation.result import read_evaluation
from pixtral_runtime.evaluation.tasks.registry import TASKS
from pixtral_runtime.files import Output, check_outputs
from pixtral_runtime.inputs.image_files import collect_images, open_image
from pixtral_runtime.inputs.text_file import read_text

READERS: dict[str, Callable[[Path], object]] = {
    "bundle": open_bundle,
    "calibration": calibration_requests,
    "checkpoint": open_checkpoint,
    "dataset": lambda path: list(read_rows(path, TASKS["custom"])),
    "evaluation": read_evaluation,
    "image": open_image,
    "images": lambda path: [open_image(found) for found in collect_images([str(path)])],
    "prompts": read_prompts,
    "report": read_report,
    "requests": lambda path: read_request_file(path, max_new_tokens=1),
    "results": read_results,
    "text": read_text,
}
NAMES = {
    "too long": "n" * 300,
    "too deep": "d/" * 3000,
    "zero byte": "a\0b",
    "link to itself": "loop",
    "within a file": "file/x",
    "within a link to itself": "loop/x",
    "absent": "absent",
    "unreadable": "unreadable",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")  # which has nothing at its beginning: EIO
    return tmp_path


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_read_is_an_error_of_ours(reader: str, name: str, folder: Path) -> None:
    with pytest.raises(InputError) as raised:
        READERS[reader](folder / name)
    assert raised.value.hint or reader == "text"  # whose callers bring the remedies


@pytest.mark.parametrize("name", [name for name in NAMES.values() if name != "absent"])
def test_what_cannot_be_written_is_an_error_of_ours(name: str, folder: Path) -> None:
    with pytest.raises(InputError):
        check_outputs([Output(folder / name / "new", Option("output", "ELSEWHERE"))])
    if name not in ("loop", "unreadable"):  # links are followed when the time comes
        with pytest.raises(InputError):
            ResultsFile.create(folder / name)


def test_a_timing_cache_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="unreadable cannot be read: Input/output error"):
        _load_timing_cache(None, folder / "unreadable")
