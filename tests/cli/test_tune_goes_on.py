"""`pixtral tune` beyond one evening: several batch sizes, logits as the measure, budgets of time, kills."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported, seal_again
from helpers.places import DEMO
from helpers.rectangles import GRID, PICTURES, write_rectangles
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    return exported(DEMO, folder, ExportSettings(dtype="float16")).path


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int4"
    return exported(DEMO, folder, ExportSettings(dtype="float16", precision="int4", method="rtn")).path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("photos"), PICTURES)


def tune(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def decided(result: dict[str, Any]) -> dict[str, Any]:
    """All but what was measured on the clock."""
    clocked = {"seconds", "seconds_by_batch", "batch"}
    rows = [{key: value for key, value in row.items() if key not in clocked} for row in result["settings"]]
    return result | {"settings": rows, "share_of_full_cost": None, "verdict": None}


def test_each_batch_size_is_timed_once_and_the_best_is_in_the_line(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--batch", "1,4", "-o", out)
    done = tune(*asked)
    assert done.exit_code == 0, done.stderr
    assert "cost, batch 1  cost, batch 4" in done.stdout
    result = json.loads((out / "tune.json").read_text())
    for row in result["settings"]:
        costs = row["seconds_by_batch"]
        assert set(costs) == {"1", "4"}
        assert row["seconds"] == min(costs.values()) == costs[str(row["batch"])]
    best = result["settings"][result["recommended"]]["batch"]
    assert result["command"].endswith(f"--image-tokens 30 --batch {best}")
    measured = (out / "measured.json").read_bytes()
    resumed = tune(*asked, "--resume", "--json")
    assert json.loads(resumed.stdout) == result  # nothing was timed anew
    assert (out / "measured.json").read_bytes() == measured


def test_a_device_has_batches_as_far_as_its_memory_goes(bundle: Path, photos: Path) -> None:
    line = (bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--device", "orin-nx-16", "--json")
    result = json.loads(tune(*line, "--batch", "1,8,40").stdout)
    for row in result["settings"]:
        costs = row["seconds_by_batch"]
        assert costs["1"] > costs["8"] > costs["40"] == row["seconds"]
    alone = json.loads(tune(*line).stdout)
    assert [row["seconds"] for row in alone["settings"]] == [row["seconds_by_batch"]["1"] for row in result["settings"]]


def test_divergence_judges_by_logits_and_survives_a_second_run(
    bundle: Path, int4: Path, photos: Path, tmp_path: Path
) -> None:
    line = (bundle, int4, "--images", photos, "--questions", photos / "two.txt", *GRID, "--metric", "divergence")
    done = tune(*line, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["metric"], result["judged_by"]) == ("divergence", f"{bundle} with full image tokens")
    few, some, full, few_int4, _, full_int4 = (row["score"]["mean"] for row in result["settings"])
    assert full == 1
    assert 0 < few < some < 1
    assert few_int4 < 0.95 < full_int4 < 1
    measured = (tmp_path / "out" / "measured.json").read_bytes()
    again = tune(*line, "-o", tmp_path / "out", "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    assert decided(json.loads(again.stdout)) == decided(result)
    assert (tmp_path / "out" / "measured.json").read_bytes() == measured


def test_answers_of_rows_do_not_count_where_logits_do(bundle: Path, photos: Path) -> None:
    line = (bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--metric", "divergence")
    result = json.loads(tune(*line, "--json").stdout)
    assert result["judged_by"] == "full image tokens"


def test_bundles_of_two_models_have_no_divergence(bundle: Path, photos: Path, tmp_path: Path) -> None:
    other = exported(DEMO, tmp_path / "other", ExportSettings(dtype="float16"))
    model = json.loads((other.path / "bundle.json").read_text())["model"]
    seal_again(other.path, model=model | {"decoder": model["decoder"] | {"norm_eps": 0.25}})
    line = (bundle, other.path, "--images", photos, "--questions", photos / "two.txt", *GRID, "--metric", "divergence")
    refused = tune(*line)
    assert refused.exit_code == 3
    assert "different models" in refused.stderr


def test_a_budget_of_time_ends_early_and_says_what_is_missing(bundle: Path, photos: Path) -> None:
    line = (bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--json")
    result = json.loads(tune(*line, "--budget", "1s", "--tolerance", 1).stdout)
    assert 3 <= result["requests"] <= 3 * 40
    whole = json.loads(tune(*line, "--budget", "1h").stdout)
    assert decided(whole) == decided(json.loads(tune(*line).stdout))


def test_killed_again_and_again_it_comes_to_what_an_undisturbed_one_does(
    bundle: Path, int4: Path, photos: Path, tmp_path: Path
) -> None:
    line = [bundle, int4, "--images", photos, "--questions", photos / "two.txt", *GRID, "--device", "h100"]
    line += ["--metric", "divergence", "--json"]
    whole = json.loads(tune(*line, "-o", tmp_path / "whole").stdout)
    out = tmp_path / "out"
    for bytes_written in (4_000, 60_000, 110_000):
        command = [sys.executable, "-m", "pixtral_cli", "tune", *map(str, line), "-o", str(out), "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.stat().st_size for path in out.glob("*.jsonl")) < bytes_written:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (out / "tune.json").exists()
    asked = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    done = tune(*line, "-o", out, "--resume")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == whole
    for name, data in asked.items():
        kept = data.rpartition(b"\n")[0]  # a last line may have been cut short
        assert (out / name).read_bytes().startswith(kept)


def test_a_picture_that_changed_under_its_name_has_another_divergence(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(photos, pictures)
    line = (bundle, "--images", pictures, "--questions", pictures / "asked.txt", *GRID, "--metric", "divergence")
    device = ("--device", "h100", "--json")
    before = json.loads(tune(*line, *device, "-o", tmp_path / "out").stdout)
    for number in range(0, PICTURES, 2):
        Image.effect_noise((64, 64), 90).convert("RGB").save(pictures / f"{number:02}.png")
    resumed = json.loads(tune(*line, *device, "-o", tmp_path / "out", "--resume").stdout)
    assert resumed["settings"][0]["score"] != before["settings"][0]["score"]
    assert resumed == json.loads(tune(*line, *device).stdout)  # as if there had been no other picture


@pytest.mark.parametrize("first", [("--batch", 4), ("--threads", 1)])
def test_records_that_were_made_otherwise_are_no_cost_of_a_request(
    first: tuple[str, int], bundle: Path, photos: Path, tmp_path: Path
) -> None:
    line = (bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "-o", tmp_path / "out")
    assert tune(*line, *first).exit_code == 0
    alone = json.loads(tune(*line, "--resume", "--json").stdout)
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    (timed,) = [numbers for measure, numbers in measured.items() if measure.endswith(", 1 at a time")]
    assert len(timed) == len(alone["settings"])
    assert {row["seconds_by_batch"]["1"] for row in alone["settings"]} <= set(timed.values())


def test_times_of_other_requests_are_not_taken(bundle: Path, photos: Path, tmp_path: Path) -> None:
    first = (bundle, "--images", photos, "--batch", "2", "-o", tmp_path / "out")
    few = "".join((photos / "rows.jsonl").read_text().splitlines(keepends=True)[:20])
    (tmp_path / "few.jsonl").write_text(few)
    assert tune(*first, "--questions", tmp_path / "few.jsonl", *GRID).exit_code == 0
    done = tune(*first, "--questions", photos / "rows.jsonl", *GRID, "--resume")
    assert done.exit_code == 0, done.stderr
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    timed = [len(numbers) for measure, numbers in measured.items() if measure.endswith(", 2 at a time")]
    assert timed == [3, 3]  # every setting by the same requests, those that come first now


def test_an_interruption_between_answers_says_how_to_go_on(bundle: Path, photos: Path, tmp_path: Path) -> None:
    line = [bundle, "--images", photos, "--questions", photos / "two.txt", *GRID, "--metric", "divergence"]
    command = [sys.executable, "-m", "pixtral_cli", "tune", *map(str, line), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    measured = tmp_path / "out" / "measured.json"
    while process.poll() is None and not (measured.exists() and "nats" in measured.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume to go on" in said
