"""A request that takes the process with it is not tried for ever, and whoever kills a run makes none suspect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.machines import plant
from helpers.places import ROOT
from helpers.results import REQUESTS, SETTINGS, answered
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.under_way import UnderWay


def machine(root: Path, kills: int, boot: str = "one") -> Path:
    """One that has ended so many processes for memory since it started."""
    return plant(root, {"proc/vmstat": f"nr_free 5\noom_kill {kills}", "proc/sys/kernel/random/boot_id": boot})


def die(path: Path, root: Path, *ids: str) -> None:
    """A run that ends with these requests under way, and leaves what it noted."""
    run = UnderWay(path, root=root)
    run.remember()
    run.open()
    for id in ids:
        run.begin(id)


def next_run(path: Path, root: Path, *done: str) -> UnderWay:
    run = UnderWay(path, done, root=root)
    run.remember()
    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_under_way_when_memory_ran_out_is_done_alone_and_at_the_second_time_no_more(
    path: Path, tmp_path: Path
) -> None:
    die(path, machine(tmp_path, 0), "a", "b", "c")
    root = machine(tmp_path, 1)
    assert (next_run(path, root, "a").suspects, next_run(path, root, "a").accused) == ({"b", "c"}, set())
    die(path, root, "b")
    root = machine(tmp_path, 2)
    run = next_run(path, root, "a")
    assert (run.suspects, run.accused) == ({"c"}, {"b"})
    run.open()
    run.close()
    assert not next_run(path, root).accused
    assert not list(tmp_path.glob(".results*"))


def test_notes_of_a_run_without_an_end_do_not_grow_for_ever(path: Path, tmp_path: Path) -> None:
    done = set[str]()
    run = UnderWay(path, done, root=machine(tmp_path, 0), most_lines=50)
    run.open()
    for number in range(1000):
        run.begin(str(number))
        if number % 100:
            done.add(str(number))  # its record is there, but for each hundredth
    notes = path.with_name(".results.jsonl.underway")
    assert len(notes.read_bytes().splitlines()) < 50
    root = machine(tmp_path, 1)
    assert next_run(path, root, *done).suspects == {str(number) for number in range(0, 1000, 100)}
    run.close()
    assert not notes.exists()


@pytest.mark.parametrize("boot", ["one", "two"])
def test_who_kills_a_run_or_pulls_the_plug_makes_nothing_suspect(path: Path, tmp_path: Path, boot: str) -> None:
    root = machine(tmp_path, 3)
    for _ in range(3):
        die(path, root, "a")
        root = machine(tmp_path, 3 if boot == "one" else 0, boot)
        assert not next_run(path, root).suspects


def test_what_nobody_counts_counts_against_the_request(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    die(path, tmp_path / "empty", "a")
    assert next_run(path, tmp_path / "empty").suspects == {"a"}


@pytest.mark.parametrize("content", [b"", b"rubbish\n", b"[]\n", b'{"deaths": {"a": []}}\n', b"\xff\n", b"[" * 9999])
def test_notes_that_are_damaged_accuse_nobody(path: Path, tmp_path: Path, content: bytes) -> None:
    path.with_name(".results.jsonl.underway").write_bytes(content)
    assert not next_run(path, tmp_path).suspects


def test_notes_go_nowhere_else_and_a_folder_that_takes_none_stops_nothing(path: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    path.with_name(".results.jsonl.underway").symlink_to("precious")
    run = UnderWay(Path("/proc/self/results.jsonl"))
    run.open()
    run.begin("a")
    run.close()
    with ResultsFile.create(path) as file:
        file.under_way.open()
        file.under_way.begin("a")
    assert not path.with_name(".results.jsonl.underway").exists()


def test_a_crash_is_noted_and_a_later_run_answers_with_an_error(path: Path) -> None:
    """As where the code of an image format fails: the process is ended by a signal of its own."""
    code = (
        "import os, signal, sys; from pathlib import Path; from helpers.results import *\n"
        "from pixtral_runtime.batch.results_file import ResultsFile\n"
        "file = ResultsFile.resume(Path(sys.argv[1]), REQUESTS, SETTINGS)\n"
        "file.under_way.open(); file.under_way.begin('a.png'); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'tests'}"}
    for expected in ({"a.png"}, set()):
        done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
        assert done.returncode == -signal.SIGSEGV
        with ResultsFile.resume(path, REQUESTS, SETTINGS) as file:
            assert file.under_way.suspects == expected
            left = path.with_name(".results.jsonl.underway").read_bytes()
        path.with_name(".results.jsonl.underway").write_bytes(left)  # as if that run had died as well
    with ResultsFile.resume(path, REQUESTS, SETTINGS) as file:
        assert file.under_way.accused == {"a.png"}
        file.append(answered(REQUESTS[0]))
