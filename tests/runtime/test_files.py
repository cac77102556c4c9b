from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.places import ROOT
from pixtral_runtime.errors import InputError, Option, PixtralError
from pixtral_runtime.files import Output, check_outputs, locked, replacing, write_atomically, write_text_atomically

SAVE = Option("save", "ANOTHER")


def refusal(*outputs: Output, inputs: list[Path] | None = None) -> str:
    with pytest.raises(PixtralError) as caught:
        check_outputs(iter(outputs), inputs or [])
    assert caught.value.exit_code == 3
    return f"{caught.value}; {caught.value.hint}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_new_places_are_accepted_and_left_alone(here: Path) -> None:
    check_outputs([Output(Path("a"), SAVE), Output(Path("new/folder/b"), SAVE), Output(here / "c", SAVE)])
    assert not list(here.iterdir())


@pytest.mark.parametrize("other", ["a", "./a", "sub/../a", "linked/a", "link-to-a"])
def test_one_place_for_two_outputs_is_refused_whatever_they_are_called(here: Path, other: str) -> None:
    (here / "sub").mkdir()
    (here / "linked").symlink_to(here)
    (here / "link-to-a").symlink_to("a")  # to nothing so far
    assert "written twice" in refusal(Output(Path("a"), SAVE), Output(Path(other), SAVE))


def test_hard_links_of_one_file_are_one_place(here: Path) -> None:
    Path("a").touch()
    Path("b").hardlink_to("a")
    assert "written twice" in refusal(Output(Path("a"), SAVE, True), Output(Path("b"), SAVE, True))


@pytest.mark.parametrize("name", ["a", "./a", "link"])
def test_an_output_over_an_input_is_refused_even_where_it_may_be_replaced(here: Path, name: str) -> None:
    Path("a").write_text("mine")
    Path("link").symlink_to("a")
    assert "cannot be written as well" in refusal(Output(Path(name), SAVE, True), inputs=[here / "b", here / "a"])
    assert Path("a").read_text() == "mine"


def test_what_exists_is_refused_with_the_ways_out(here: Path) -> None:
    Path("a").touch()
    assert refusal(Output(Path("a"), SAVE)) == "a exists; force=True to replace it; save=ANOTHER"
    assert "resume=True" in refusal(Output(Path("a"), SAVE, resumable=True))
    check_outputs([Output(Path("a"), SAVE, replaces=True)])


def test_what_is_no_file_is_refused(here: Path) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, word in (("folder", "is a folder"), ("pipe", "not a regular"), ("/dev/null", "not a regular")):
        assert word in refusal(Output(Path(name), SAVE, replaces=True))


def test_a_place_below_a_file_and_a_name_too_long_are_refused(here: Path) -> None:
    Path("file").touch()
    assert "Not a directory" in refusal(Output(Path("file/a"), SAVE))
    assert "name too long" in refusal(Output(Path("x" * 300), SAVE))
    assert "name too long" in refusal(Output(Path("new", "x" * 300, "a"), SAVE))


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    assert "cannot be written" in refusal(Output(Path("/proc/self/a"), SAVE))


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_stays_a_link(here: Path) -> None:
    Path("real").write_text("old")
    Path("real").chmod(0o640)
    Path("link").symlink_to("real")
    write_atomically(Path("link"), b"new")
    assert (Path("link").is_symlink(), Path("real").read_bytes()) == (True, b"new")
    assert stat.S_IMODE(Path("real").stat().st_mode) == 0o640
    assert {path.name for path in here.iterdir()} == {"real", "link"}


def test_a_file_that_is_not_finished_leaves_the_old_one_and_no_other(here: Path) -> None:
    Path("a").write_text("old")

    def interrupted() -> None:
        with replacing(Path("a")) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Path("a").read_text() == "old"
    assert [path.name for path in here.iterdir()] == ["a"]


def test_text_with_bytes_that_are_no_text_is_written_with_escapes(here: Path) -> None:
    write_text_atomically(Path("page"), "caf\udce9 é")
    assert Path("page").read_text(encoding="utf-8") == "caf\\udce9 é"


def test_a_lock_holds_against_another_process_and_leaves_nothing(here: Path) -> None:
    code = "from pathlib import Path; from pixtral_runtime.files import locked\nwith locked(Path('lock')): pass"
    other = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "runtime")}
    with locked(Path("lock")):
        refused = subprocess.run(other, env=environment, capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr
    assert subprocess.run(other, env=environment).returncode == 0
    assert not Path("lock").exists()


def test_merging_over_one_of_the_files_is_refused(here: Path) -> None:
    from pixtral_runtime.batch.shards import merge_results

    Path("a.jsonl").touch()
    with pytest.raises(InputError, match="cannot be written as well"):
        merge_results([Path("a.jsonl")], Path("./a.jsonl"), force=True)
