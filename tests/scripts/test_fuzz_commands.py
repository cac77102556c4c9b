"""The fuzz finds no bug in a handful of invocations, and does find one that is put there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fuzz_commands
from fuzz_commands import Outcome, invoke, outcomes, summary
from fuzz_files import make_world
from fuzz_lines import LINES, arguments, built, parameters
from helpers.places import ROOT
from pixtral_cli.main import COMMANDS, app


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    make_world(folder)
    return folder


def test_a_handful_of_invocations_finds_no_bug(world: Path) -> None:
    script = [sys.executable, "scripts/fuzz_commands.py", "--count", "40", "--world", str(world)]
    roots = (ROOT, ROOT / "export", ROOT / "engines", ROOT / "runtime")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["bad"], found["invocations"]) == (0, [], 40)
    assert sum(len(codes) for codes in found["exit_codes"].values()) > 10  # they do different things


def test_every_command_and_option_is_tried() -> None:
    assert set(LINES) - {"api"} == {function.__name__ for function, _ in COMMANDS} == set(built(app).commands)
    assert {"backend", "threads", "json_schema"} <= {option.name for option in parameters("run")}
    tried = [argument for seed in range(300) for argument in arguments("plan", random.Random(seed))]
    assert {"--precision", "--dtype", "--context", "--device", "--json", "0", "nan"} <= set(tried)
    assert {"int4", "int8", "fp8", "nvfp4"} & set(tried)  # out of its help


def test_a_number_is_the_same_invocation_again(world: Path) -> None:
    first, again, another = (invoke(number, 0, world) for number in (7, 7, 8))
    assert first == again
    assert first.line != another.line


def test_a_bug_is_found_with_the_place_where_it_began(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Any:
        raise KeyError("oops")

    monkeypatch.setattr("pixtral_runtime.bundle.manifest.open_bundle", broken)
    monkeypatch.setattr(fuzz_commands, "LINES", {"inspect": ["bundle"]})
    found = summary(invoke(number, 0, world) for number in range(10))
    assert found["bad"]
    assert "KeyError: 'oops'" in found["bad"][0]["trace"]
    assert "test_fuzz_commands.py" in found["bad"][0]["trace"]


def test_a_crash_is_found_and_the_others_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(number: int, seed: int, world: Path) -> Outcome:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(number, "run", "", 0)

    monkeypatch.setattr(fuzz_commands, "invoke", crashing)
    monkeypatch.setattr(fuzz_commands, "DATA_BYTES", 1 << 45)
    found = list(outcomes(range(3, 7), 0, tmp_path / "world"))
    assert [(one.number, one.exit_code) for one in found] == [(3, 0), (4, -1), (5, 0), (6, 0)]
    assert "-9" in found[1].said
