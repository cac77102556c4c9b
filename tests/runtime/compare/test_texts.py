"""`pixtral compare` on texts: what both bundles predict at each of their tokens, with nothing answered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.places import DATA
from pixtral_cli.main import app
from pixtral_runtime import load
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.compare.compare import CompareSettings, compare_bundles
from pixtral_runtime.compare.divergence import kl_nats
from pixtral_runtime.compare.page import compare_page
from pixtral_runtime.compare.result import BundleComparison
from pixtral_runtime.compare.texts import TEXT_WINDOW
from pixtral_runtime.errors import MachineError
from pixtral_runtime.inputs.text_windows import BadText, Text

LONG = "A black rectangle stands on a light background, and nobody minds. " * 30
TEXTS: list[Text | BadText] = [
    Text("a.txt", "a.txt", LONG),
    Text("b.jsonl:1", "b.jsonl", "Short."),
    BadText("b.jsonl:2", "it is empty"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def exact(folder: Path) -> Path:
    return export_tiny(DATA / "tiny-pixtral", folder / "float32", dtype="float32")


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    return export_tiny(DATA / "tiny-pixtral", folder / "float16", dtype="float16")


def compared(a: Path, b: Path, **settings: Any) -> BundleComparison:
    return compare_bundles(
        open_bundle(a), open_bundle(b), [], [], CompareSettings(**settings), lambda *_: None, read=TEXTS
    )


def whole_logits(bundle: Path, ids: Any) -> Any:
    model = load(bundle)
    prompt = model.prompts.plain(ids)
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    return model.runner.prefill(prompt, model.runner.no_features, cache, all_logits=True)


def test_each_token_of_a_text_is_a_position(exact: Path, half: Path) -> None:
    report = compared(exact, half)
    tokens = load(exact).prompts.encode(LONG)
    assert len(tokens) > TEXT_WINDOW
    assert [case.text for case in report.cases] == ["a.txt@0", f"a.txt@{TEXT_WINDOW - 1}", "b.jsonl:1@0"]
    assert [case.positions for case in report.cases[:2]] == [TEXT_WINDOW - 1, len(tokens) - TEXT_WINDOW + 1]
    assert report.answers is None and report.reference.decode_tokens_per_s is None
    assert [skipped.prompt for skipped in report.skipped] == ["b.jsonl:2"] and "empty" in report.skipped[0].reason
    second = tokens[TEXT_WINDOW - 1 : -1]  # the last one is predicted, and nothing after it
    rows = zip(whole_logits(exact, second), whole_logits(half, second), strict=True)
    expected = [kl_nats(ours, theirs) for ours, theirs in rows]
    assert report.cases[1].kl_mean_nats == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-12)
    assert report.cases[1].kl_mean_nats > 0
    assert all(layer.key_db is not None and layer.key_db > 40 for layer in report.layers)
    page = compare_page(report)
    assert "a.txt@0" in page and "nothing was answered" in page


def test_a_text_is_predicted_alike_by_the_same_bundle_and_a_limit_ends_the_pieces(exact: Path) -> None:
    report = compared(exact, exact, most_windows=1)
    assert len(report.cases) == 1 and report.logits.kl_max_nats < 1e-9
    assert report.worst_layer is None


def test_texts_that_the_disk_cannot_hold_are_refused_with_a_limit(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(MachineError, match="which has 2,000,000 left") as caught:
        compared(exact, exact)
    assert caught.value.options[0].name == "limit"


def test_the_command_reads_files_and_folders(exact: Path, half: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("# A title")
    (tmp_path / "b.jsonl").write_text('{"text": "A line."}\n{"text": 5}\n')
    line = ["compare", exact, half, "--texts", tmp_path / "texts", "--texts", tmp_path / "b.jsonl", "--json"]
    done = CliRunner().invoke(app, [str(argument) for argument in line])
    assert done.exit_code == 5 and "b.jsonl:2: there is no field 'text'" in done.stderr, done.stderr
    assert [case["text"] for case in json.loads(done.stdout)["cases"]] == ["a.md@0", "b.jsonl:1@0"]
    table = CliRunner().invoke(app, [str(argument) for argument in line[:-1]])
    assert "a.md@0" in table.stdout and "same_answer" not in table.stdout
    none = CliRunner().invoke(app, ["compare", str(exact), str(half), "--texts", str(tmp_path / "none")])
    assert none.exit_code == 3 and "none is not there" in none.stderr and "--texts FILE" in none.stderr
