"""`generation_config.json`: its sampling goes into the bundle, and is what answers are drawn with by default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import export_tiny, exported, seal_again
from helpers.places import DEMO, IMAGES
from pixtral_cli.main import app
from pixtral_export.checkpoint.generation_config import read_sampling
from pixtral_runtime import Sampling, load
from pixtral_runtime.bundle.manifest import SamplingDefaults, open_bundle
from pixtral_runtime.errors import BundleError, CheckpointError

PICTURE = IMAGES / "red_triangle_64x64.png"
PUBLISHED = {  # in the shape that transformers writes
    "_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "temperature": 0.15,
    "transformers_version": "4.50.0.dev0",
}  # fmt: skip


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that says how to draw, so hot that nothing of it is greedy."""
    folder = export_tiny(DEMO, tmp_path_factory.mktemp("drawn") / "bundle", dtype="float32")
    seal_again(folder, sampling={"temperature": 5.0, "top_p": 0.95})
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PUBLISHED, SamplingDefaults(0.15, 1.0)),
        (PUBLISHED | {"top_p": 0.95, "temperature": 0.7}, SamplingDefaults(0.7, 0.95)),
        ({"do_sample": True}, SamplingDefaults(1.0, 1.0)),
        ({"do_sample": True, "temperature": 0}, SamplingDefaults(0.0, 1.0)),
        ({"do_sample": True, "temperature": None, "top_p": None}, SamplingDefaults(1.0, 1.0)),
        (PUBLISHED | {"do_sample": False}, None),
        ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "temperature": None}, None),
        ({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.15}, None),  # transformers would not draw either
    ],
)
def test_the_published_keys_are_read(config: dict[str, Any], expected: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", 0),
        ("do_sample", 1),
    ],
)
def test_another_value_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED | {key: value}))
    with pytest.raises(CheckpointError, match=key):
        read_sampling(tmp_path)


def test_a_wrong_value_is_found_before_any_weight_is_downloaded(hf: Path) -> None:
    (hf / "generation_config.json").write_text(json.dumps(PUBLISHED | {"top_p": 2}))
    planned = invoke("export", hf, "-o", hf / "bundle", "--dry-run")
    assert planned.exit_code == 3
    assert "top_p is 2" in planned.stderr


def test_an_export_keeps_it(hf: Path, tmp_path: Path) -> None:
    (hf / "generation_config.json").write_text(json.dumps(PUBLISHED))
    bundle = exported(hf, tmp_path / "bundle")
    assert bundle.sampling == SamplingDefaults(0.15, 1.0)
    assert open_bundle(bundle.path) == bundle
    assert "temperature 0.15, top-p 1" in invoke("inspect", bundle.path).stdout


def test_bundles_without_it_open_and_are_greedy(drawn: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn, tmp_path / "old"))
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["sampling"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    seal_again(folder)
    assert "sampling" not in json.loads((folder / "bundle.json").read_text())
    assert open_bundle(folder).sampling is None
    done = invoke("ask", folder, PICTURE, "--max-new-tokens", 3, "--json")
    assert json.loads(done.stdout)["sampling"]["temperature"] == 0
    assert "drawn" not in done.stderr


def test_a_manifest_of_other_values_is_refused(drawn: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn, tmp_path / "bundle"))
    seal_again(folder, sampling={"temperature": 1.0, "top_p": 2.0})
    with pytest.raises(BundleError, match=r"top_p is 2\.0"):
        open_bundle(folder)


def test_python_draws_as_the_checkpoint_says_unless_told_otherwise(drawn: Path) -> None:
    model = load(drawn)
    own = model.generate("What?", PICTURE, max_new_tokens=12)
    greedy = model.generate("What?", PICTURE, max_new_tokens=12, sampling=Sampling())
    assert own.token_ids != greedy.token_ids
    asked = Sampling(temperature=5.0, top_p=0.95)
    assert own == model.generate("What?", PICTURE, max_new_tokens=12, sampling=asked)
    assert "".join(model.stream("What?", PICTURE, max_new_tokens=12)) == own.text


def test_commands_say_it_once_and_record_what_was_used(drawn: Path, tmp_path: Path) -> None:
    asked = ("run", drawn, PICTURE, "--max-new-tokens", 4)
    done = invoke(*asked, "-o", tmp_path / "a.jsonl")
    assert done.stderr.count("as the checkpoint says, at temperature 5 with top-p 0.95") == 1
    settings = json.loads((tmp_path / "a.jsonl").read_text())["settings"]
    assert (settings["temperature"], settings["top_p"]) == (5.0, 0.95)
    done = invoke(*asked, "-o", tmp_path / "b.jsonl", "--temperature", 0)
    settings = json.loads((tmp_path / "b.jsonl").read_text())["settings"]
    assert (settings["temperature"], "checkpoint" in done.stderr) == (0, False)
    shown = invoke("ask", drawn, PICTURE, "--max-new-tokens", 4, "--top-p", 0.5, "--json")
    assert json.loads(shown.stdout)["sampling"] == {"temperature": 5.0, "top_p": 0.5, "seed": 0}
    assert shown.stderr.count("as the checkpoint says") == 1


def test_an_evaluation_stays_greedy(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(PICTURE, tmp_path / "data" / "a.png")
    row = {"image": "a.png", "question": "What?", "answers": ["triangle"]}
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = invoke("eval", drawn, "--task", "custom", "--data", tmp_path / "data", "--save", tmp_path / "s.json")
    assert done.exit_code == 0, done.stderr
    answers = (tmp_path / "s.answers.jsonl").read_text().splitlines()
    assert json.loads(answers[0])["settings"]["temperature"] == 0
