"""`pixtral tune` of checkpoints: bundles are exported on the way, gone on with, and refused where they are others."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.places import DEMO, ROOT
from helpers.rectangles import write_rectangles
from helpers.tiny import edit_weights
from helpers.traces import sharing_traces
from pixtral_cli.main import app
from pixtral_cli.tune_grid import FINEST_FIRST
from pixtral_export.plan import ExportSettings
from pixtral_export.quantization.recipes import RECIPES
from pixtral_runtime.bundle.manifest import MANIFEST, PARTIAL, Bundle, open_bundle
from pixtral_runtime.bundle.spec import ACTIVATION_DTYPES

ASKED = ("--image-tokens", "30", "--max-new-tokens", 4, "--tolerance", 20)
SHORT = ("--max-context", 512, "--calibration-samples", 2)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("photos") / "all", 40)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("photos") / "few", 4)


def line(sources: Path | tuple[Path, ...], photos: Path, out: Path, *options: object) -> list[object]:
    named = sources if isinstance(sources, tuple) else (sources,)
    questions = photos / "rows.jsonl"
    return ["tune", *named, "--images", photos, "--questions", questions, "-o", out, *ASKED, *options]


@pytest.fixture(scope="module")
def tuned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a tuning, and what the command said."""
    out = tmp_path_factory.mktemp("tuning") / "out"
    return out, invoke(*line(DEMO, photos, out, "--precision", "int4,float16", *SHORT))


@pytest.fixture
def copy(tuned: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(tuned[0], tmp_path / "out"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The demo checkpoint with one weight changed."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "other"))
    edit_weights(folder / "consolidated.safetensors", lambda weights: weights["norm.weight"].mul_(1.5))
    return folder


def bundles(out: Path) -> dict[str, Bundle]:
    return {path.parent.name: open_bundle(path.parent) for path in sorted((out / "bundles").glob(f"*/{MANIFEST}"))}


def test_a_checkpoint_becomes_bundles_and_a_line_that_runs(tuned: tuple[Path, Any]) -> None:
    out, done = tuned
    assert done.exit_code == 0, done.stderr
    made = bundles(out)
    assert {name: (one.precision, one.dtype) for name, one in made.items()} == {
        "float16": ("float16", "float16"),
        "int4": ("int4", "float16"),
    }
    assert {one.limits.max_context for one in made.values()} == {512}
    assert made["int4"].quantization["samples"] == 2
    assert all((one.path / "certificate.json").is_file() for one in made.values())
    result = json.loads((out / "tune.json").read_text())
    tried = [one["bundle"] for one in result["settings"]]
    assert tried == [str(out / "bundles" / name) for name in ("float16", "int4")]  # the finest first
    assert "calibrating with the packaged samples" in done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:2] == ["pixtral", "run"] and words[2] in tried
    again = invoke(*words[1:], "--max-new-tokens", 1, "--limit", 1)
    assert again.exit_code == 0, again.stderr


def test_bundles_that_are_there_are_taken_by_resume_only(tuned: tuple[Path, Any], photos: Path) -> None:
    out, _ = tuned
    asked = line(DEMO, photos, out, "--precision", "float16,int4", *SHORT)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    refused = invoke(*asked)
    assert refused.exit_code == 3
    assert f"{out / 'bundles' / 'float16'} exists" in refused.stderr
    assert "--resume to go on with it; --force to replace it" in refused.stderr
    result = json.loads((out / "tune.json").read_text())
    resumed = invoke(*asked, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout) == result
    assert "exporting" not in resumed.stderr
    del before[out / "tune.json"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_same_weights_elsewhere_are_the_same_checkpoint(copy: Path, photos: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(DEMO, tmp_path / "moved", copy_function=shutil.copyfile)
    resumed = invoke(*line(Path(moved), photos, copy, "--precision", "float16", *SHORT[:2]), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "exporting" not in resumed.stderr


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (("--max-context", 256, *SHORT[2:]), "was made from other settings"),
        ((*SHORT[:2], "--calibration-samples", 3), "was made from other calibration samples"),
        ((*SHORT, "--calibration", DEMO.parent / "images"), "was made from other calibration samples"),
    ],
)
def test_a_bundle_made_otherwise_is_never_taken(
    changes: tuple[object, ...], difference: str, copy: Path, few: Path
) -> None:
    refused = invoke(*line(DEMO, few, copy, "--precision", "int4", "--resume", *changes))
    assert refused.exit_code == 3, refused.stderr
    assert f"{copy / 'bundles' / 'int4'} {difference}" in refused.stderr
    assert "-o ANOTHER_FOLDER" in refused.stderr


def test_a_bundle_of_other_weights_is_never_taken_and_force_replaces_it(copy: Path, few: Path, other: Path) -> None:
    asked = line(other, few, copy, "--precision", "float16", *SHORT[:2])
    before = bundles(copy)["float16"].fingerprint
    refused = invoke(*asked, "--resume")
    assert refused.exit_code == 3
    assert f"{copy / 'bundles' / 'float16'} was made from another checkpoint" in refused.stderr
    assert bundles(copy)["float16"].fingerprint == before
    replaced = invoke(*asked, "--force")
    assert replaced.exit_code == 0, replaced.stderr
    after = bundles(copy)["float16"].fingerprint
    assert after != before
    assert json.loads((copy / "bundles" / "float16.json").read_text())["fingerprint"] == after


def test_a_bundle_that_somebody_put_there_is_not_taken(copy: Path, few: Path) -> None:
    target = copy / "bundles" / "float16"
    asked = line(DEMO, few, copy, "--precision", "float16", "--resume", *SHORT[:2])
    note = target.with_name("float16.json")
    for text in ("{", "[]", "{}"):
        note.write_text(text)
        refused = invoke(*asked)
        assert refused.exit_code == 3
        assert f"{target} was not exported by tune" in refused.stderr
    note.unlink()
    assert "was not exported by tune" in invoke(*asked).stderr


def test_caches_are_settings_too_and_pictures_to_calibrate_with_must_be_others(few: Path, tmp_path: Path) -> None:
    done = invoke(
        *line(DEMO, few, tmp_path / "out", "--kv-cache", "int8,float16", *SHORT, "--calibration", few), "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert {name: one.kv_cache for name, one in bundles(tmp_path / "out").items()} == {
        "float16": None,
        "float16-kv-int8": "int8",
    }
    tried = [Path(one["bundle"]).name for one in json.loads(done.stdout)["settings"]]
    assert tried == ["float16", "float16-kv-int8"]
    assert "4 of the pictures to calibrate with are asked about as well" in done.stderr


def test_bundles_and_checkpoints_are_mixed_in_their_order(few: Path, other: Path, tmp_path: Path) -> None:
    given, out = exported(DEMO, tmp_path / "given", ExportSettings(dtype="float32")).path, tmp_path / "out"
    done = invoke(*line((other, given, DEMO), few, out, *SHORT[:2]), "--json")
    assert done.exit_code == 0, done.stderr
    tried = [one["bundle"] for one in json.loads(done.stdout)["settings"]]
    assert tried == [str(out / "bundles/other-float16"), str(given), str(out / "bundles/tiny-pixtral-float16")]
    made = bundles(out)
    assert made["other-float16"].fingerprint != made["tiny-pixtral-float16"].fingerprint


def test_an_export_that_was_killed_goes_on(tuned: tuple[Path, Any], few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = list(map(str, line(DEMO, few, out, "--precision", "float16,int4", *SHORT)))
    journal = out / "bundles" / "int4" / PARTIAL / "calibration" / "journal.json"
    command = [sys.executable, "-m", "pixtral_cli", *asked]
    process = subprocess.Popen(command, cwd=ROOT, env=sharing_traces(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not journal.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    written = json.loads(journal.read_text())
    assert written["units"] and list(bundles(out)) == ["float16"]
    journal.write_text(json.dumps(written | {"rounded": {"planted": [1.0, 2.0]}}))
    weights = out / "bundles" / "float16" / "weights.bin"
    before = weights.stat().st_mtime_ns
    assert invoke(*asked).exit_code == 3
    resumed = invoke(*asked, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"exporting {out / 'bundles' / 'int4'} (1 of 1)" in resumed.stderr
    assert weights.stat().st_mtime_ns == before
    assert "planted" in bundles(out)["int4"].quantization["rounded_layers"]  # it went on, and did not begin anew
    whole = bundles(tuned[0])
    assert {name: one.fingerprint for name, one in bundles(out).items()} == {
        name: one.fingerprint for name, one in whole.items()
    }


def test_who_interrupts_an_export_is_told_how_it_goes_on(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(name: str, done: int, total: int) -> None:
        if name == "tracing graphs" and "int4" in str(list((tmp_path / "out" / "bundles").iterdir())):
            raise KeyboardInterrupt

    monkeypatch.setattr("pixtral_cli.output.Bars.stage", lambda bars, *stage: press_ctrl_c(*stage))
    stopped = invoke(*line(DEMO, few, tmp_path / "out", "--precision", "float16,int4", *SHORT))
    assert stopped.exit_code == 130
    assert "interrupted: 1 of 2 bundles were exported; --resume goes on with the next" in stopped.stderr


def test_a_bundle_that_was_whole_when_the_command_was_killed_is_taken(copy: Path, few: Path) -> None:
    target = copy / "bundles" / "float16"
    inside = target / PARTIAL
    inside.mkdir()
    for path in target.iterdir():
        if path != inside:
            path.rename(inside / path.name)
    resumed = invoke(*line(DEMO, few, copy, "--precision", "float16", "--resume", *SHORT[:2]))
    assert resumed.exit_code == 0, resumed.stderr
    assert "exporting" not in resumed.stderr
    assert (target / MANIFEST).is_file() and not inside.exists()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (("--precision", "int5"), "'int5' is none of float32", "--precision float16,int4"),
        (("--precision", ""), "'' is none of float32", "--precision float16,int4"),
        (("--precision", "int4,,int8"), "'' is none of float32", "--precision float16,int4"),
        (("--kv-cache", "fp8"), "'fp8' is none of same", "--kv-cache same,int8"),
        (("--kv-cache", "float32"), "float16 has no cache in float32", "--kv-cache same,int8"),
        (("--precision", "int4,nvfp4"), "nvfp4 runs in TensorRT only", "leave nvfp4 out of --precision"),
        (("--precision", "bfloat16"), "bfloat16 runs in TensorRT only", "--precision int4"),
        (("--precision", "float16,float32", "--device", "l4"), "float32 does not run on l4", "leave float32 out of"),
        (("--kv-cache", "same,int8", "--device", "thor"), "a cache in int8 does not run on thor", "leave int8 out of"),
        (("--device", "l4", "--batch", "100000,200000"), "float16 does not run on l4", "--precision int4"),
        (("--precision", "int4,int8,fp8", "--backend", "ort-cuda"), "int8 has no products", "leave int8 and fp8 out"),
        (("--backend", "trt"), "--backend trt runs engines", "--backend auto"),
        (("--backend", "abacus"), "no backend 'abacus'", "--backend auto|"),
        (("--preprocess", "taste"), "unknown preprocess mode 'taste'", "--preprocess mistral|hf"),
        (("--max-context", "0"), "a context of 0 tokens", "--max-context"),
        (("--calibration", "photos"), "--calibration would do nothing", "--precision int4"),
        (("--calibration-samples", "2"), "--calibration-samples would do nothing", "--precision int4"),
        (("--precision", "int4", "--calibration", "nowhere.jsonl"), "nowhere.jsonl", "--calibration FOLDER"),
        (("--metric", "taste"), "no metric 'taste'", "--metric"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_export(
    changes: tuple[str, ...], message: str, hint: str, few: Path, tmp_path: Path
) -> None:
    refused = invoke(*line(DEMO, few, tmp_path / "out", *changes))
    assert refused.exit_code == 3, refused.stderr
    assert message in refused.stderr
    assert hint in refused.stderr.splitlines()[-1]
    assert "exporting" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_needs_a_folder_and_a_name_of_its_own(few: Path, tmp_path: Path) -> None:
    asked = line(DEMO, few, tmp_path / "out")
    place = asked.index("-o")
    refused = invoke(*asked[:place], *asked[place + 2 :])
    assert refused.exit_code == 3
    assert f"{DEMO} is no bundle" in refused.stderr
    assert "--output tuning/" in refused.stderr
    namesake = Path(shutil.copytree(DEMO, tmp_path / "there" / DEMO.name))
    twice = invoke(*line((DEMO, namesake), few, tmp_path / "out"))
    assert twice.exit_code == 3
    assert f"two checkpoints are called {DEMO.name}" in twice.stderr
    gone = invoke(*line(tmp_path / "nowhere", few, tmp_path / "out"))
    assert gone.exit_code == 3
    assert "nowhere: no such folder" in gone.stderr


def test_the_disk_must_hold_all_bundles(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6_000_000))
    refused = invoke(*line(DEMO, few, tmp_path / "out", "--precision", "float16,int4"))  # 5.2 and 2.5 MB
    assert refused.exit_code == 4
    assert "of disk" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_every_precision_has_its_place() -> None:
    assert sorted(FINEST_FIRST) == sorted((*ACTIVATION_DTYPES, *RECIPES))
