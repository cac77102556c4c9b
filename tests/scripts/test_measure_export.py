"""What an export takes, seen from outside: the script's figures and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.places import ROOT
from helpers.traces import sharing_traces

CHECKPOINT = ROOT / "tests/data/tiny-pixtral"
SETTINGS = ["--dtype", "float32", "--max-context", "512"]


def _measured(checkpoint: Path, bundle: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    script = [sys.executable, "scripts/measure_export.py", str(checkpoint), str(bundle), *arguments]
    done = subprocess.run(script, cwd=ROOT, env=sharing_traces(), capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1, done.stderr
    return json.loads(done.stdout), done.returncode


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured") / "bundle"


@pytest.fixture(scope="module")
def result(bundle: Path) -> dict[str, Any]:
    measured, exit_code = _measured(CHECKPOINT, bundle, *SETTINGS)
    assert exit_code == measured["exit_code"] == 0
    return measured


def test_further_arguments_reach_the_export(result: dict[str, Any], bundle: Path) -> None:
    assert result["arguments"] == SETTINGS
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["limits"]["max_context"] == 512


def test_sizes_are_those_on_disk(result: dict[str, Any], bundle: Path) -> None:
    assert result["checkpoint_bytes"] == _file_bytes(CHECKPOINT)
    assert result["bundle_bytes"] == _file_bytes(bundle)
    assert result["peak_disk_bytes"] >= result["bundle_bytes"]


def test_memory_is_that_of_a_process_with_torch(result: dict[str, Any]) -> None:
    assert 50e6 < result["peak_rss_bytes"] < 20e9
    for part in ("peak_anonymous_bytes", "peak_rss_file_bytes"):
        # A poll may read counters that the kernel's own peak has not summed yet.
        assert 10e6 < result[part] < 1.1 * result["peak_rss_bytes"], part


def test_time_and_transfers_are_counted(result: dict[str, Any]) -> None:
    assert 0 < result["cpu_s"] < 100 * result["wall_s"]
    assert result["read_call_bytes"] > 1e6  # Python's own modules, at least
    assert result["read_bytes"] >= 0 and result["written_bytes"] >= 0  # 0 on a file system in memory


def test_a_failed_export_is_measured_and_its_exit_code_passed_on(tmp_path: Path) -> None:
    measured, exit_code = _measured(tmp_path / "absent", tmp_path / "bundle")
    assert exit_code == measured["exit_code"] == 3
    assert measured["bundle_bytes"] == measured["checkpoint_bytes"] == 0
    assert measured["wall_s"] > 0
