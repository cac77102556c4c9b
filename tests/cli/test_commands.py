"""The commands on a real bundle: what they print, write and exit with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import seal_again
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_runtime import load


def invoke(*arguments: object, stdin: str = "") -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "bundle"
    done = invoke("export", checkpoint, "-o", target, "--dtype", "float32", "--max-context", 512, "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    about = ("bundle.json", "certificate.json")
    assert summary["bundle_bytes"] == sum(p.stat().st_size for p in target.iterdir() if p.name not in about)
    assert (summary["max_context"], summary["max_image_side"], summary["format"]) == (512, 256, "mistral")
    return target


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        Image.new("RGB", (48, 32), color).save(folder / name)
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_export_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    done = invoke("export", checkpoint, "-o", tmp_path / "b", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert done.exit_code == 0
    assert plan["bundle_bytes"] > 0
    assert plan["peak_memory_bytes"] > 0
    assert plan["seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_export_refuses_an_existing_bundle_and_says_force(checkpoint: Path, bundle: Path) -> None:
    done = invoke("export", checkpoint, "-o", bundle)
    assert done.exit_code == 3
    assert "--force" in done.stderr
    assert json.loads((bundle / "bundle.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--dtype", "int3"], "float16"),
        (["--opset", "17"], "24"),
        (["--max-context", "9999999"], "131072"),
        (["--max-context", "0"], "131072"),
        (["--max-image-side", "0"], "side of 0 px is outside"),
    ],
)
def test_export_names_what_is_valid(checkpoint: Path, tmp_path: Path, arguments: list[str], word: str) -> None:
    done = invoke("export", checkpoint, "-o", tmp_path / "b", *arguments)
    assert done.exit_code == 3
    assert word in done.stderr


def test_inspect_names_engines_that_are_listed_wrongly(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    seal_again(copy, engines={"rtx:sm89": {"graphs": 5}})
    shown = invoke("inspect", copy)
    assert (shown.exit_code, "engines for rtx:sm89 cannot be read" in shown.stderr) == (3, True)


def test_inspect_shows_and_verifies(bundle: Path) -> None:
    shown = invoke("inspect", bundle)
    assert shown.exit_code == 0
    assert all(word in shown.stdout for word in ("fingerprint", "weights.bin", "position_ids", "float32"))
    document = json.loads(invoke("inspect", bundle, "--verify", "--json").stdout)
    assert document["verified"]
    assert document["model"]["decoder"]["head_dim"] == 32
    assert document["graphs"]["embed"]["inputs"][0] == {"name": "token_ids", "shape": ["B", "T"], "dtype": "int64"}


def test_run_answers_every_image(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "results.jsonl"
    done = invoke("run", bundle, photos, "-p", "What?", "-o", out, "--max-new-tokens", 4)
    assert done.exit_code == 0, done.stderr
    model = load(bundle)
    expected = {str(p): model.generate("What?", [p], max_new_tokens=4).text for p in sorted(photos.iterdir())}
    assert {r["id"]: r["answer"] for r in records(out)} == expected
    assert all(f"{name}: {answer}" in done.stdout for name, answer in expected.items())


def test_run_goes_on_after_a_broken_image_and_exits_5(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:60])
    done = invoke("run", bundle, photos, "-o", tmp_path / "r.jsonl", "--max-new-tokens", 2, "--json")
    assert done.exit_code == 5
    summary = json.loads(done.stdout)
    assert (summary["requests"], summary["answered"]) == (3, 2)
    assert [Path(entry["id"]).name for entry in summary["failed"]] == ["b.png"]
    assert {Path(r["id"]).name for r in records(tmp_path / "r.jsonl") if r["error"]} == {"b.png"}
    assert "b.png" in done.stderr


def test_run_reads_a_list_and_a_prompt_file(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("What is it?\n", encoding="utf-8")
    arguments = ("-p", f"@{tmp_path / 'prompt.txt'}", "--limit", 1, "--max-new-tokens", 3, "-o", tmp_path / "r.jsonl")
    done = invoke("run", bundle, "-", *arguments, stdin=f"{photos / 'c.png'}\n{photos / 'a.png'}\n")
    assert done.exit_code == 0, done.stderr
    (record,) = records(tmp_path / "r.jsonl")
    assert Path(record["id"]).name == "c.png"
    assert record["answer"] == load(bundle).generate("What is it?", [photos / "c.png"], max_new_tokens=3).text


def test_run_asks_several_questions_and_shards_and_merges(bundle: Path, photos: Path, tmp_path: Path) -> None:
    asked = ("run", bundle, photos, "-p", "What?", "-p", "Which color?", "--max-new-tokens", 3, "-o")
    assert invoke(*asked, tmp_path / "all.jsonl").exit_code == 0
    for part in (1, 2):
        assert invoke(*asked, tmp_path / f"{part}.jsonl", "--shard", f"{part}/2", "--batch", part).exit_code == 0
    whole = {record["id"]: record for record in records(tmp_path / "all.jsonl")}
    assert len(whole) == 6
    assert str(photos / "a.png#2") in whole
    merged = invoke("merge", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "-o", tmp_path / "merged.jsonl")
    assert merged.exit_code == 0, merged.stderr
    joined = {record["id"]: record for record in records(tmp_path / "merged.jsonl")}
    assert {name: record["answer"] for name, record in joined.items()} == {n: r["answer"] for n, r in whole.items()}
    assert {name: record["key"] for name, record in joined.items()} == {n: r["key"] for n, r in whole.items()}


def test_run_works_off_a_file_of_requests(bundle: Path, photos: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "pair", "prompt": "Which?", "images": ["photos/a.png", "photos/b.png"], "max_new_tokens": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]},
    ]
    shutil.copytree(photos, tmp_path / "jobs" / "photos")
    (tmp_path / "jobs" / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "r.jsonl"
    arguments = ("--requests", tmp_path / "jobs" / "asked.jsonl", "--max-new-tokens", 5, "-o", out)
    done = invoke("run", bundle, *arguments, "--format", "csv")
    assert done.exit_code == 0, done.stderr
    found = {record["id"]: record for record in records(out)}
    assert (
        found["pair"]["answer"]
        == load(bundle).generate("Which?", [photos / "a.png", photos / "b.png"], max_new_tokens=2).text
    )
    assert found["2"]["answer"] == load(bundle).generate("Hello?", max_new_tokens=5).text
    assert (tmp_path / "r.csv").read_text(encoding="utf-8-sig").splitlines()[1].startswith("pair,")


def test_run_scales_images_to_a_budget(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "big.png")
    sizes = {}
    for flag, value in (("--max-image-side", 64), ("--image-tokens", 30), ("--preprocess", "hf")):
        out = tmp_path / f"{flag}.jsonl"
        assert invoke("run", bundle, tmp_path / "big.png", flag, value, "-o", out, "--max-new-tokens", 1).exit_code == 0
        (record,) = records(out)
        sizes[flag] = (record["image_tokens"], record["settings"]["preprocess"])
    assert sizes == {
        "--max-image-side": (20, "mistral"), "--image-tokens": (30, "mistral"), "--preprocess": (272, "hf"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["PHOTOS", "-p", ""], "prompt is empty"),
        (["PHOTOS", "-p", "@nowhere.txt"], "nowhere.txt cannot be read"),
        (["PHOTOS", "-p", "go " * 600], "context of 512"),
        (["PHOTOS", "--max-image-side", "9999"], "limit of 256"),
        (["PHOTOS", "--max-image-side", "0"], "side 0 px is less than one patch"),
        (["PHOTOS", "--preprocess", "clip"], "--preprocess mistral|hf"),
        (["PHOTOS", "--temperature", "-1"], "temperature"),
        (["EMPTY"], "no images"),
        ([], "either images or a file"),
        (["PHOTOS", "--requests", "asked.jsonl"], "either images or a file"),
        (["--requests", "nowhere.jsonl"], "nowhere.jsonl"),
        (["PHOTOS", "--batch", "many"], "--batch many"),
        (["PHOTOS", "--shard", "3/2"], "3/2"),
        (["PHOTOS", "--format", "xlsx"], "csv|parquet"),
        (["PHOTOS", "--json-schema", "nowhere.json"], "nowhere.json"),
    ],
)
def test_run_refuses_bad_input_before_any_work(
    bundle: Path, photos: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty")}
    out = tmp_path / "r.jsonl"
    done = invoke("run", bundle, *(places.get(argument, argument) for argument in arguments), "-o", out)
    assert done.exit_code == 3, done.stderr
    assert words in done.stderr
    assert "hint: " in done.stderr
    assert not out.exists()


def test_an_image_that_cannot_fit_is_refused_before_any_work(checkpoint: Path, tmp_path: Path, photos: Path) -> None:
    assert invoke("export", checkpoint, "-o", tmp_path / "b", "--max-context", 100).exit_code == 0
    Image.new("RGB", (256, 256)).save(photos / "large.png")  # 272 tokens
    out = tmp_path / "r.jsonl"
    for command in (["run", tmp_path / "b", photos, "-o", out], ["ask", tmp_path / "b", photos / "large.png"]):
        done = invoke(*command)
        assert done.exit_code == 3
        assert "272" in done.stderr
        assert "--image-tokens" in done.stderr
    assert not out.exists()
    small = ["--image-tokens", "40", "-p", "What?", "--max-new-tokens", "2", "-o", out]
    assert invoke("run", tmp_path / "b", photos, *small).exit_code == 0
    (photos / "large.png").unlink()
    assert (
        invoke("run", tmp_path / "b", photos, "-p", "What?", "--max-new-tokens", "2", "-o", out, "--force").exit_code
        == 0
    )


def test_run_keeps_existing_results(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("precious\n")
    assert invoke("run", bundle, photos, "-o", tmp_path / "r.jsonl").exit_code == 3
    assert (tmp_path / "r.jsonl").read_text() == "precious\n"


def test_ctrl_c_finishes_what_runs_and_resume_goes_on(bundle: Path, photos: Path, tmp_path: Path) -> None:
    """The first record makes the job's own thread send itself what Ctrl-C sends."""
    for number in range(12):
        shutil.copy(photos / "a.png", photos / f"{number}.png")
    asked = ("run", bundle, photos, "--max-new-tokens", 4, "--batch", 2)
    assert invoke(*asked, "-o", tmp_path / "whole.jsonl").exit_code == 0
    out = tmp_path / "r.jsonl"
    command = [sys.executable, "-c", INTERRUPTING, *map(str, asked), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr
    first = records(out)
    assert 1 <= len(first) < 15
    assert invoke(*asked, "-o", out).exit_code == 3  # not without saying so
    assert invoke(*asked, "-o", out, "--resume", "-p", "Another question?").exit_code == 3
    resumed = invoke(*asked, "-o", out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["kept"] == len(first)
    answers = {record["id"]: record["answer"] for record in records(out)}
    assert len(records(out)) == 15
    assert answers == {record["id"]: record["answer"] for record in records(tmp_path / "whole.jsonl")}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_asks_a_service_to_stop_acts_as_ctrl_c(name: str, bundle: Path, photos: Path, tmp_path: Path) -> None:
    asked = ("run", str(bundle), str(photos), "--max-new-tokens", "2", "--batch", "1", "-o", str(tmp_path / "r.jsonl"))
    command = [sys.executable, "-c", INTERRUPTING.replace("SIGINT)", f"{name})"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "--resume" in done.stderr) == (130, True), done.stderr
    assert 1 <= len(records(tmp_path / "r.jsonl")) < 3


def test_a_program_that_was_told_to_ignore_a_signal_ignores_it(bundle: Path, photos: Path, tmp_path: Path) -> None:
    asked = ("run", str(bundle), str(photos), "--max-new-tokens", "2", "-o", str(tmp_path / "r.jsonl"))
    script = INTERRUPTING.replace("SIGINT)", "SIGHUP)").replace("SIG_DFL", "SIG_IGN")
    done = subprocess.run([sys.executable, "-c", script, *asked], capture_output=True, text=True, check=False)
    assert (done.returncode, len(records(tmp_path / "r.jsonl"))) == (0, 3), done.stderr


INTERRUPTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a shell put in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this one
from pixtral_cli.main import app
from pixtral_runtime.batch.results_file import ResultsFile
append = ResultsFile.append
def interrupted(self, record):
    append(self, record)
    os.kill(os.getpid(), signal.SIGINT)
    ResultsFile.append = append
ResultsFile.append = interrupted
app(sys.argv[1:])
"""


def test_ask_streams_one_answer_over_several_images(bundle: Path, photos: Path) -> None:
    images = [photos / "a.png", photos / "c.png"]
    done = invoke("ask", bundle, *images, "-p", "Which?", "--max-new-tokens", 5)
    expected = load(bundle).generate("Which?", images, max_new_tokens=5)
    assert (done.exit_code, done.stdout) == (0, expected.text + "\n")
    document = json.loads(invoke("ask", bundle, *images, "-p", "Which?", "--max-new-tokens", 5, "--json").stdout)
    assert document["text"] == expected.text
    assert document["image_tokens"] == 2 * (3 + 1) * 2
    assert document["preprocess"] == "mistral"


def test_ask_works_without_an_image(bundle: Path) -> None:
    assert invoke("ask", bundle, "-p", "Hello?", "--max-new-tokens", 3).exit_code == 0


def test_check_passes_for_its_own_checkpoint(bundle: Path, checkpoint: Path) -> None:
    done = invoke("check", bundle, "--against", checkpoint)
    assert done.exit_code == 0, done.stderr
    assert "PASSED: 24 of 24" in done.stdout
    assert all(stage in done.stdout for stage in ("tables", "vision", "embed", "prefill", "decode"))


def test_check_fails_for_other_weights(bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=5)
    done = invoke("check", bundle, "--against", other, "--json")
    assert done.exit_code == 6
    document = json.loads(done.stdout)
    assert document["verdict"] == "FAILED"
    passed = {comparison["stage"] for comparison in document["comparisons"] if comparison["passed"]}
    assert passed == {"tables"}  # which no weights decide


def test_check_refuses_a_checkpoint_of_another_size(bundle: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = tiny_config()
    other = write_checkpoint(tmp_path / "other", replace(config, decoder=replace(config.decoder, n_layers=1)))
    assert invoke("check", bundle, "--against", other).exit_code == 3
