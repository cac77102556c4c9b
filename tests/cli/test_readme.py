"""What the README shows of the demo checkpoint is what the commands print: its console blocks, line by line."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from demo_bundles import easy_vqa_data
from helpers.places import ROOT
from pixtral_cli.main import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DEMO = "artifacts/demo"
DATA = ".venv/lib/python3.11/site-packages/easy_vqa/data"
QUESTIONS = 60  # the README's score is over all 9,673, which take minutes
NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Shown:
    """A command line of a console block, and the lines below it. "…" stands for what is left out."""

    command: str
    lines: list[str]


def console_lines(page: str) -> list[Shown]:
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            found.append(Shown(shlex.join(shlex.split(command, comments=True)), lines))
    return found


def not_printed(shown: list[str], printed: str) -> list[str]:
    """Lines that the README shows and the command did not print."""
    patterns = {line: re.compile(".*".join(map(re.escape, line.split("…")))) for line in shown}
    return [line for line, pattern in patterns.items() if not any(map(pattern.fullmatch, printed.splitlines()))]


def recipe(target: str) -> list[str]:
    """The command lines of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None, target
    return [line.strip() for line in found[1].replace("$(DEMO)", DEMO).splitlines()]


def pixtral(line: str, folder: Path, *more: str) -> str:
    """All that a command line prints where what it writes lies in `folder`."""
    program, *arguments = shlex.split(line.replace(DEMO, str(folder)).replace(DATA, str(easy_vqa_data())))
    assert Path(program).name == "pixtral"
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    return done.output.replace(str(folder), DEMO)


SHOWN = {shown.command: shown.lines for shown in console_lines(README)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def made(folder: Path) -> str:
    """What `make demo` prints, but for the set-up of its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return "".join(pixtral(line.replace("$(BIN)", ".venv/bin"), folder) for line in recipe("demo"))


def test_every_line_that_is_shown_has_its_test() -> None:
    assert [shlex.split(command)[:2] for command in SHOWN] == [
        ["make", "demo"], ["make", "test"], [".venv/bin/pixtral", "ask"], [".venv/bin/pixtral", "eval"],
    ]  # fmt: skip


def test_make_demo_prints_what_is_shown(made: str) -> None:
    assert not_printed(SHOWN["make demo"], made) == []
    assert sum(line.startswith("tests/data/images/") for line in SHOWN["make demo"]) >= 2


def test_make_test_tries_the_wheel_as_shown() -> None:
    (parts,) = recipe("test")
    assert parts.endswith(" lint tests wheel")
    (command,) = recipe("wheel")
    script, _ = command.split()
    last = (ROOT / script).read_text(encoding="utf-8").splitlines()[-1]
    assert last in [f'echo "{line}"' for line in SHOWN["make test"]]


@pytest.mark.usefixtures("made")
def test_ask_and_eval_print_what_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ask, evaluate = (command for command in SHOWN if command.startswith(".venv/bin/pixtral"))
    assert not_printed(SHOWN[ask], pixtral(ask, folder)) == []
    assert str(easy_vqa_data()).endswith(DATA.partition("site-packages")[2])
    printed = pixtral(evaluate, folder, "--limit", str(QUESTIONS))
    assert not_printed([NUMBER.sub("…", line) for line in SHOWN[evaluate]], printed) == []
    score = re.search(r"^exact +(\S+)%", printed, re.MULTILINE)
    assert score is not None and float(score[1]) >= 95


def test_a_changed_answer_is_found() -> None:
    (shown,) = console_lines("```console\n$ pixtral ask x -p 'what?'  # asks\n…\nteal\n8 of …; 4 tokens\n```\n")
    assert shown.command == "pixtral ask x -p 'what?'"
    assert not_printed(shown.lines, "first\nteal\n8 of 8 done; 4 tokens\n") == []
    assert not_printed(shown.lines, "first\nred\n8 of 8 done; 5 tokens\n") == ["teal", "8 of …; 4 tokens"]
