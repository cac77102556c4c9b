"""What a build takes, seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.bundles import exported
from helpers.places import DEMO, ROOT
from pixtral_runtime.bundle.manifest import open_bundle


def measured(bundle: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    script = [sys.executable, "scripts/measure_build.py", str(bundle), *arguments]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1, done.stderr
    return json.loads(done.stdout), done.returncode


def test_engines_and_memory_are_those_of_the_build(tmp_path: Path) -> None:
    bundle = exported(DEMO, tmp_path / "b").path
    seen, code = measured(bundle, "--target", "rtx:sm89")
    assert code == seen["exit_code"] == 0
    listed = open_bundle(bundle).engines["rtx:sm89"]["graphs"]
    assert seen["engines"] == {"rtx:sm89": {graph: entry["bytes"] for graph, entry in listed.items()}}
    assert 50e6 < seen["peak_anonymous_bytes"] < seen["peak_rss_bytes"] < 20e9


def test_a_refused_build_passes_its_exit_code_on(tmp_path: Path) -> None:
    seen, code = measured(tmp_path / "absent", "--target", "rtx:sm89")
    assert code == seen["exit_code"] == 3 and seen["engines"] == {}
