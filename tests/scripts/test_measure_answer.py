"""The script that measures what a bundle takes to answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers.places import ROOT
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export


def test_measure_answer_counts_the_weights_a_decode_step_reads(tmp_path: Path) -> None:
    opened = open_checkpoint(ROOT / "tests" / "data" / "tiny-pixtral")
    plan = plan_export(opened, ExportSettings(precision="int4", method="rtn", max_context=512))
    export(opened, plan, tmp_path / "b", force=False, progress=lambda *_: None)
    script = [sys.executable, "scripts/measure_answer.py", str(tmp_path / "b"), "--prompt-tokens", "8", "--steps", "2"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    decoder = [item for item in plan.weights if item.name.startswith(("layers.", "norm.", "output."))]
    assert result["decode_weight_bytes"] == sum(item.nbytes for item in decoder)
    assert result["precision"] == "int4" and result["decode_tokens_per_s"] > 0
