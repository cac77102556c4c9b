"""The doctor: the facts, and the command that shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from helpers.machines import plant
from helpers.places import ROOT
from pixtral_cli.main import app
from pixtral_runtime.device import doctor
from pixtral_runtime.device.doctor import Finding, examine
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.device.sysfs import SYSTEM, jetson_model

MEMORY_TOLERANCE_BYTES = 1_000_000_000  # other programs take and give back between two looks
PYPROJECT = ROOT / "pyproject.toml"


def row(name: str, root: Path = SYSTEM) -> Finding:
    return next(row for row in examine(root) if row.name == name)


def run_doctor(*flags: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *flags])


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Change what the metadata of some packages says; None: not installed."""
    changed = {name.replace("_", "-"): value for name, value in versions.items()}

    def pretended(name: str) -> str:
        found = changed[name] if name in changed else version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", pretended)


def pretend_smi(monkeypatch: pytest.MonkeyPatch, result: str | Exception) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if isinstance(result, Exception):
            raise result
        return subprocess.CompletedProcess(command, 0, result, "")

    monkeypatch.setattr(subprocess, "run", run)


def test_this_machine_can_run_bundles() -> None:
    assert [row.name for row in examine() if row.needed and row.status == "missing"] == []
    assert row("onnxruntime").value.startswith(version("onnxruntime"))
    assert "CPU" in row("onnxruntime").value
    assert row("numpy").value == version("numpy")


def test_json_is_one_document_with_every_row() -> None:
    result = run_doctor("--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["ready"] is True
    assert [entry["name"] for entry in document["rows"]] == [row.name for row in examine()]
    assert {entry["status"] for entry in document["rows"]} <= {"ok", "warn", "missing"}


def test_table_shows_each_row_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, torch=None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    result = run_doctor()
    line = next(line for line in result.stdout.splitlines() if " torch " in line)
    assert line.split(maxsplit=4) == ["missing", "torch", "not", "installed", "pip install 'pixtral[export]'"]
    assert result.exit_code == 0
    assert result.stderr == "pixtral can run bundles here\n"


def test_without_onnxruntime_it_exits_4_and_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pretend_installed(monkeypatch, onnxruntime=None)
    result = run_doctor("--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["ready"] is False
    assert result.stderr.endswith("lacks: onnxruntime\nhint: pip install 'pixtral[cpu]'\n")


def test_with_a_gpu_the_install_line_is_the_gpu_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pretend_installed(monkeypatch, onnxruntime=None)
    pretend_smi(monkeypatch, "NVIDIA L4, 23034 MiB, 570.86, 8.9\nNVIDIA L4, 23034 MiB, 570.86, 8.9\n")
    assert row("onnxruntime").fix == "pip install 'pixtral[gpu]'"
    assert row("cuda device").value == "; ".join(["NVIDIA L4, 23034 MiB, 570.86, 8.9"] * 2)


def test_both_onnxruntime_packages_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    found = row("onnxruntime")
    assert found.status == "warn"
    assert found.value == "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 overwrite each other"
    assert found.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'pixtral[")


def test_a_half_removed_onnxruntime_is_broken_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    found = row("onnxruntime")
    assert found.status == "missing"
    assert found.value.startswith("broken: ")
    assert "uninstall" in found.fix


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (FileNotFoundError(), "missing", "none found"),
        (subprocess.TimeoutExpired("nvidia-smi", 10), "warn", "no answer in 10 s"),
        (subprocess.CalledProcessError(9, "nvidia-smi"), "warn", "failed"),
    ],
)
def test_a_gpu_that_does_not_answer_is_said(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, status: str, words: str
) -> None:
    pretend_smi(monkeypatch, failure)
    found = row("cuda device")
    assert found.status == status
    assert words in found.value


def test_a_jetson_is_named_and_gets_tensorrt_from_jetpack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "jetson" not in {row.name for row in examine()}
    plant(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"})
    pretend_installed(monkeypatch, tensorrt=None)
    assert row("jetson", tmp_path).value == "NVIDIA Jetson AGX Orin Developer Kit"
    assert row("tensorrt", tmp_path).fix == "sudo apt install python3-libnvinfer"


def test_another_board_is_no_jetson(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    assert jetson_model(tmp_path) is None
    assert "jetson" not in {finding.name for finding in examine(tmp_path)}


def test_available_memory_is_what_psutil_says() -> None:
    seen = available_memory_bytes()
    assert seen is not None
    assert abs(seen - psutil.virtual_memory().available) < MEMORY_TOLERANCE_BYTES


def test_low_memory_and_a_system_without_counters(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    assert row("memory", tmp_path).value == "unknown"
    counters = "MemTotal:       16000000 kB\nMemAvailable:    1000000 kB\nHugePages_Total:       0\n"
    plant(tmp_path, {"proc/meminfo": counters})
    assert (row("memory", tmp_path).status, row("memory", tmp_path).value) == ("warn", "1.0 GB available of 16.4 GB")


def test_a_submodule_of_a_missing_package_is_missing() -> None:
    row = doctor._package("no_such_package.bindings", ["no-such-bindings"], "pip install it")
    assert (row.status, row.value) == ("missing", "not installed")


def test_packages_and_extras_are_those_of_the_project() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[>=]", requirement)[0] for requirement in requirements}

    assert {distribution for _, distribution, *_ in doctor.BASE_PACKAGES} <= names(project["dependencies"])
    extras = project["optional-dependencies"]
    for extra, packages in doctor.EXTRA_PACKAGES.items():
        assert {distribution for _, distribution in packages} == names(extras[extra]) - set(doctor.ORT_PACKAGES)
    for extra, package in zip(("cpu", "gpu"), doctor.ORT_PACKAGES, strict=True):
        assert names(extras[extra]) & set(doctor.ORT_PACKAGES) == {package}
    assert extras["export"][0] == "torch==2.13.0"


def test_every_documented_install_line_brings_exactly_one_runtime() -> None:
    """`dev` holds `cpu`. Two at once would break each other, none could not run."""
    lines = [
        (path.name, extras.split(","))
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile", ROOT / "scripts/check_wheel.sh"]
        for extras in re.findall(
            r"pip install .*?(?:pixtral|\.|\.whl\))\[([a-z,]+)\]", path.read_text(encoding="utf-8")
        )
    ]
    assert {name for name, _ in lines} >= {"Makefile", "check_wheel.sh", "CONTRIBUTING.md"}
    assert [(name, extras) for name, extras in lines if len({"cpu", "gpu", "dev"} & set(extras)) != 1] == []
