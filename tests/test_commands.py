"""The commands on a real bundle: what they print, write and exit with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pixtral_cli.main import app
from pixtral_runtime import load
from tiny import tiny_config, write_checkpoint


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
    assert summary["bundle_bytes"] == sum(p.stat().st_size for p in target.iterdir() if p.name != "bundle.json")
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
    ],
)
def test_export_names_what_is_valid(checkpoint: Path, tmp_path: Path, arguments: list[str], word: str) -> None:
    done = invoke("export", checkpoint, "-o", tmp_path / "b", *arguments)
    assert done.exit_code == 3
    assert word in done.stderr


def test_inspect_shows_and_verifies(bundle: Path) -> None:
    shown = invoke("inspect", bundle)
    assert shown.exit_code == 0
    assert all(word in shown.stdout for word in ("fingerprint", "weights.bin", "position_ids", "float32"))
    document = json.loads(invoke("inspect", bundle, "--verify", "--json").stdout)
    assert document["verified"]
    assert document["model"]["decoder"]["head_dim"] == 32
    assert document["graphs"]["embed"]["inputs"][0] == {"name": "token_ids", "shape": ["B", "T"], "dtype": "int64"}


def test_run_answers_every_image_in_order(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "results.jsonl"
    done = invoke("run", bundle, photos, "-p", "What?", "-o", out, "--max-new-tokens", 4)
    assert done.exit_code == 0, done.stderr
    model = load(bundle)
    expected = {p.name: model.generate("What?", [p], max_new_tokens=4).text for p in sorted(photos.iterdir())}
    assert {Path(r["path"]).name: r["answer"] for r in records(out)} == expected
    assert [Path(r["path"]).name for r in records(out)] == ["a.png", "b.png", "c.png"]
    assert all(f"{photos / name}: {answer}" in done.stdout for name, answer in expected.items())


def test_run_goes_on_after_a_broken_image_and_exits_5(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:60])
    done = invoke("run", bundle, photos, "-o", tmp_path / "r.jsonl", "--max-new-tokens", 2, "--json")
    assert done.exit_code == 5
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["answered"]) == (3, 2)
    assert [Path(entry["path"]).name for entry in summary["failed"]] == ["b.png"]
    assert [r["error"] is None for r in records(tmp_path / "r.jsonl")] == [True, False, True]
    assert "b.png" in done.stderr


def test_run_reads_a_list_and_a_prompt_file(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("What is it?\n", encoding="utf-8")
    arguments = ("-p", f"@{tmp_path / 'prompt.txt'}", "--limit", 1, "--max-new-tokens", 3, "-o", tmp_path / "r.jsonl")
    done = invoke("run", bundle, "-", *arguments, stdin=f"{photos / 'c.png'}\n{photos / 'a.png'}\n")
    assert done.exit_code == 0, done.stderr
    (record,) = records(tmp_path / "r.jsonl")
    assert Path(record["path"]).name == "c.png"
    assert record["answer"] == load(bundle).generate("What is it?", [photos / "c.png"], max_new_tokens=3).text


def test_run_scales_images_to_a_budget(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "big.png")
    sizes = {}
    for flag, value in (("--max-image-side", 64), ("--image-tokens", 30), ("--preprocess", "hf")):
        out = tmp_path / f"{flag}.jsonl"
        assert invoke("run", bundle, tmp_path / "big.png", flag, value, "-o", out, "--max-new-tokens", 1).exit_code == 0
        sizes[flag] = (records(out)[0]["image_tokens"], records(out)[0]["preprocess"])
    assert sizes == {
        "--max-image-side": (20, "mistral"), "--image-tokens": (30, "mistral"), "--preprocess": (272, "hf"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["PHOTOS", "-p", ""], "prompt is empty"),
        (["PHOTOS", "-p", "@nowhere.txt"], "prompt file"),
        (["PHOTOS", "-p", "go " * 600], "context of 512"),
        (["PHOTOS", "--max-image-side", "9999"], "limit of 256"),
        (["PHOTOS", "--preprocess", "clip"], "mistral, hf"),
        (["PHOTOS", "--temperature", "-1"], "temperature"),
        (["EMPTY"], "no images"),
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


def test_an_interrupted_run_keeps_its_records(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixtral_runtime.model import Model

    answer, calls = Model.answer, []

    def interrupted(self: Model, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(Model, "answer", interrupted)
    done = invoke("run", bundle, photos, "-o", tmp_path / "r.jsonl", "--max-new-tokens", 2)
    assert done.exit_code == 130
    assert len(records(tmp_path / "r.jsonl")) == 2
    assert "r.jsonl" in done.stderr


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
    assert "PASSED: 20 of 20" in done.stdout
    assert all(stage in done.stdout for stage in ("vision", "embed", "prefill", "decode"))


def test_check_fails_for_other_weights(bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=5)
    done = invoke("check", bundle, "--against", other, "--json")
    assert done.exit_code == 6
    document = json.loads(done.stdout)
    assert document["verdict"] == "FAILED"
    assert not any(comparison["passed"] for comparison in document["comparisons"])


def test_check_refuses_a_checkpoint_of_another_size(bundle: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = tiny_config()
    other = write_checkpoint(tmp_path / "other", replace(config, decoder=replace(config.decoder, n_layers=1)))
    assert invoke("check", bundle, "--against", other).exit_code == 3
