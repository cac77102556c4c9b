"""No library below pixtral reports how it is used: none keeps an id of the machine, and none is allowed to send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bundles import export_tiny
from helpers.places import DEMO, IMAGES

SWITCHES = ("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")
SETTINGS = """
import pixtral_runtime
import ray._common.usage.usage_lib as ray_usage
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY
assert not ray_usage.usage_stats_enabled()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(DEMO, tmp_path_factory.mktemp("b") / "bundle")


def left_behind(home: Path, code: str, *arguments: object) -> list[Path]:
    """The files that a Python process of a user without settings leaves in an empty home."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        environment[name] = str(home / name)
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, cwd=home, check=True)
    return sorted(path for path in home.rglob("*") if path.is_file())


def test_a_home_stays_empty(bundle: Path, tmp_path: Path) -> None:
    image = next(IMAGES.glob("*.png"))
    library = "import sys; from pixtral_runtime import load; load(sys.argv[1]).generate('What is shown?', sys.argv[2])"
    assert left_behind(tmp_path / "library", library, bundle, image) == []
    command = "from pixtral_cli.main import main; main()"
    export = (
        "export",
        DEMO,
        "-o",
        "b",
        "--dry-run",
    )  # all imports; tracing takes half a minute in a process of its own
    for arguments in (("ask", bundle, image, "-p", "x"), ("run", bundle, image, "-q"), export):
        assert left_behind(tmp_path / str(arguments[0]), command, *arguments) == []


def test_a_home_would_not_stay_empty_by_itself(bundle: Path, tmp_path: Path) -> None:
    alone = "import sys; import onnxruntime as ort; ort.InferenceSession(sys.argv[1])"
    if not left_behind(tmp_path / "alone", alone, bundle / "decoder.onnx"):
        pytest.skip("this ONNX Runtime keeps nothing about its use: the test above shows nothing")


def test_what_else_may_report_is_told_not_to(tmp_path: Path) -> None:
    left_behind(tmp_path / "home", SETTINGS)
