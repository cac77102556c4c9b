"""`pixtral eval` end to end: scores, comparisons, resumption, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from demo_bundles import easy_vqa_data
from helpers.bundles import exported
from helpers.judge_stub import Reply, judge_server
from helpers.places import DEMO, ROOT
from helpers.terminal import Terminal
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 160, 20), "black": (0, 0, 0)}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int4"
    return exported(DEMO, folder, ExportSettings(precision="int4", method="rtn")).path


def write_rows(folder: Path, count: int) -> Path:
    """Questions about pictures of one shape each; every tenth reference is wrong."""
    folder.mkdir()
    rows = []
    for index in range(count):
        name, color = list(COLORS.items())[index % len(COLORS)]
        picture = Image.new("RGB", (64, 64), (240, 240, 240))
        picture.paste(color, (8 + index % 8, 8, 40 + index % 8, 40))
        picture.save(folder / f"{index:03}.png")
        answer = "no such colour" if index % 10 == 9 else name
        question = "what color is the rectangle?"
        rows.append({"id": f"{index:03}", "image": f"{index:03}.png", "question": question, "answers": [answer]})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def test_easy_vqa_is_scored_from_the_published_files(bundle: Path, tmp_path: Path) -> None:
    arguments = ("--task", "easy_vqa", "--data", easy_vqa_data(), "--limit", 100, "--save", tmp_path / "r.json")
    done = invoke(bundle, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["headline"], seen["scored"], seen["rows"], seen["missing"]) == ("exact", 100, 100, [])
    assert seen["scores"]["exact"]["mean"] >= 0.95
    assert seen["scores"]["exact"]["low"] <= seen["scores"]["exact"]["mean"] <= seen["scores"]["exact"]["high"]
    assert seen["setting"]["precision"] == "float32"
    held = json.loads((tmp_path / "r.json").read_bytes())
    assert len(held["examples"]) == 100 and held["scores"] == seen["scores"]


def test_one_file_of_rows_is_as_good_as_its_folder(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", 4)
    asked = ("--task", "custom", "--json", "--data")
    of_folder, of_file = (json.loads(invoke(bundle, *asked, place).stdout) for place in (data, data / "rows.jsonl"))
    assert of_file["scores"] == of_folder["scores"]
    assert of_file["scored"] == 4
    refused = invoke(bundle, *asked, data / "rows.jsonl", "--save", data / "rows.jsonl", "--force")
    assert refused.exit_code == 3 and "is read" in refused.stderr
    neither = invoke(bundle, *asked, data / "000.png")
    assert neither.exit_code == 3 and "no file of JSON lines" in neither.stderr


def test_broken_rows_and_pictures_are_listed_and_the_score_is_over_the_rest(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", 12)
    (data / "003.png").write_bytes(b"broken")
    with (data / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"image": "none.png", "question": "what?", "answers": ["x"]}\n{"image": "000.png"}\n')
    done = invoke(bundle, "--task", "custom", "--data", data, "--json")
    assert done.exit_code == 5, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["scored"], seen["rows"]) == (11, 14)
    assert seen["scores"]["exact"]["n"] == 11 and len(seen["missing"]) == 3
    assert "11 of 14 examples were scored" in done.stderr


def test_a_run_killed_in_mid_task_and_resumed_has_the_score_of_an_undisturbed_one(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", 120)
    asked = ["--task", "custom", "--data", data, "--batch", "4", "--json"]
    whole = invoke(bundle, *asked, "--save", tmp_path / "whole.json")
    assert whole.exit_code == 0, whole.stderr
    saved = tmp_path / "killed.json"
    command = [sys.executable, "-m", "pixtral_cli", "eval", str(bundle), *map(str, asked), "--save", str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = saved.with_suffix(".answers.jsonl")
    while process.poll() is None and not (answers.exists() and answers.stat().st_size > 20_000):
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = len(answers.read_bytes().splitlines())
    assert 0 < kept < 120 and not saved.exists()
    again = invoke(bundle, *asked, "--save", saved)
    assert again.exit_code == 3 and "--resume" in again.stderr
    resumed = invoke(bundle, *asked, "--save", saved, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    first, second = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert second["setting"]["kept"] >= kept - 1
    for result in (first, second):
        result["setting"] = {k: v for k, v in result["setting"].items() if k not in ("seconds", "kept")}
    assert first == second
    held = [json.loads((tmp_path / name).read_bytes())["examples"] for name in ("whole.json", "killed.json")]
    assert held[0] == held[1]


def test_another_bundle_is_compared_with_pairs_and_a_page_shows_what_flipped(
    bundle: Path, int4: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data", 40)
    asked = ("--task", "custom", "--data", data)
    assert invoke(bundle, *asked, "--save", tmp_path / "a.json").exit_code == 0
    page = tmp_path / "b.html"
    done = invoke(int4, *asked, "--save", tmp_path / "b.json", "--against", tmp_path / "a.json", "--html", page)
    assert done.exit_code in (0, 6), done.stderr
    assert "against the other" in done.stdout and "p = " in done.stdout
    both = invoke(int4, *asked, "--save", tmp_path / "c.json", "--against", bundle, "--json")
    compared = json.loads(both.stdout)["comparison"]
    assert compared["changes"]["exact"]["n"] == 40
    assert (tmp_path / "c.against.json").exists()
    text = page.read_text(encoding="utf-8")
    assert "no such colour" in text and "http" not in text.replace("http-equiv", "")


def test_turns_of_mm_mt_bench_are_answered_then_rated_and_nothing_is_paid_for_twice(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    talk = [{"role": role, "content": text} for role, text in (("user", "what is it?"), ("assistant", "a shape"))]
    write_rows(tmp_path / "data", 2)
    rows = [
        {"image": f"{n:03}.png", "conversation": json.dumps(talk * (n + 1)), "category": ("charts", "tables")[n]}
        for n in range(2)
    ]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    asked = ("--task", "mm_mt_bench", "--data", tmp_path / "data", "--save", tmp_path / "r.json", "--json")
    short = ("--max-new-tokens", 4)
    without = invoke(bundle, *asked, *short)
    assert without.exit_code == 5 and "no judge" in without.stderr, without.stderr
    assert json.loads(without.stdout)["scored"] == 0
    with judge_server(Reply("[[4]]"), Reply("[[8]]"), Reply("[[6]]")) as judge:
        done = invoke(bundle, *asked, *short, "--resume", "--judge-url", judge.url)
        assert done.exit_code == 0, done.stderr
        again = invoke(bundle, *asked, *short, "--resume", "--judge-url", judge.url)
        assert len(judge.requests) == 3
    seen = json.loads(done.stdout)
    assert (seen["headline"], seen["scored"], seen["setting"]["kept"]) == ("rating", 3, 3)
    assert seen["averages"]["micro"] == seen["scores"]["rating"]["mean"] == 6
    assert json.loads(again.stdout)["scores"] == seen["scores"]
    assert "a-key" not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("r.*"))


def test_perplexity_of_a_text_is_kept_compared_and_resumed(bundle: Path, int4: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.md"
    text.write_text("The red square is left of the blue one. " * 60, encoding="utf-8")
    asked = ("--task", "perplexity", "--data", text, "--window", 64, "--save", tmp_path / "a.json", "--json")
    done = invoke(bundle, *asked, "--limit", 5)
    assert done.exit_code == 0, done.stderr
    more = invoke(bundle, *asked, "--resume", "--limit", 8, "--html", tmp_path / "page.html")
    assert more.exit_code == 0, more.stderr
    seen = json.loads(more.stdout)
    assert (seen["scored"], seen["setting"]["kept"], seen["setting"]["window"]) == (8, 5, 64)
    scores = seen["scores"]
    assert scores["perplexity"]["mean"] == pytest.approx(math.exp(scores["nats_per_token"]["mean"]))
    assert scores["nats_per_token"]["low"] < scores["nats_per_token"]["mean"] < scores["nats_per_token"]["high"]
    both = invoke(int4, *asked[:6], "--limit", 8, "--against", tmp_path / "a.json")
    assert both.exit_code in (0, 6), both.stderr
    assert "of the perplexity" in both.stdout and "paired bootstrap" in both.stdout and "flipped" not in both.stdout
    other = invoke(int4, *asked[:4], "--window", 32, "--against", tmp_path / "a.json")
    assert other.exit_code == 3 and "another question" in other.stderr
    clash = invoke(bundle, *asked[:6], "--save", text, "--force")
    assert clash.exit_code == 3 and text.read_text(encoding="utf-8").startswith("The red")


def test_a_bundle_that_lost_its_answers_ends_with_exit_6(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", 20)
    assert invoke(bundle, "--task", "custom", "--data", data, "--save", tmp_path / "a.json").exit_code == 0
    cut = ("--max-new-tokens", 1, "--max-image-side", 16)  # what a broken export would do
    done = invoke(bundle, "--task", "custom", "--data", data, *cut, "--against", tmp_path / "a.json")
    assert done.exit_code == 6, done.stdout + done.stderr
    assert "worse by" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--task", "chess"], "easy_vqa"),
        (["--task", "custom", "--data", "{tmp}/none"], "none"),
        (["--task", "custom", "--data", "{tmp}"], "jsonl"),
        (["--task", "custom", "--data", "{data}", "--resume"], "--save"),
        (["--task", "custom", "--data", "{data}", "--save", "{data}"], "is a folder"),
        (["--task", "custom", "--data", "{data}", "--against", "{tmp}/none.json"], "none.json"),
        (["--task", "custom", "--data", "{data}", "--judge-url", "http://localhost"], "--judge-url"),
        (["--task", "mm_mt_bench", "--data", "{data}"], "--save"),
        (["--task", "perplexity", "--data", str(ROOT / "README.md"), "--window", "1"], "--window"),
        (["--task", "perplexity", "--data", "{data}/000.png"], ".jsonl"),
        (["--task", "mmlu", "--data", "{data}"], "--shots 0"),
        (["--task", "perplexity"], "--data"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    bundle: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    data = write_rows(tmp_path / "data", 1)
    done = invoke(bundle, *(argument.format(tmp=tmp_path, data=data) for argument in arguments))
    assert done.exit_code in (3, 4), done.output
    assert word in done.stderr and "hint:" in done.stderr


def test_one_window_of_a_text_tells_nothing_of_a_difference(bundle: Path, int4: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A rectangle is a shape with four corners.\n")
    done = invoke(int4, "--task", "perplexity", "--data", tmp_path / "text.txt", "--against", bundle)
    assert done.exit_code == 0, done.stderr
    assert "one example tells nothing of a difference" in done.stdout
    assert " to " not in done.stdout  # no interval


def test_a_long_text_that_changed_is_named_in_a_line_with_an_option_of_this_command(
    bundle: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 200 + "here and there " + "word " * 100)
    line = ("--task", "perplexity", "--data", text, "--save", tmp_path / "a.json")
    assert invoke(bundle, *line).exit_code == 0
    text.write_text("word " * 200 + "here and everywhere " + "word " * 100)
    refused = invoke(bundle, *line, "--resume")
    assert refused.exit_code == 3
    assert "here and there" in refused.stderr
    assert "here and everywhere" in refused.stderr
    assert len(refused.stderr) < 800
    assert "--save another.json" in refused.stderr


def test_control_characters_of_a_dataset_do_nothing_to_the_terminal(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", 2)
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    rows[0]["group"], rows[1]["group"] = "\x1b]0;title\x07", "plain"
    (data / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    terminal = Terminal("eval", bundle, "--task", "custom", "--data", data, cache=tmp_path)
    assert terminal.end() == 0, terminal.shown
    assert "exact by group" in terminal.shown
    assert "\\x1b]0;title\\x07" in terminal.shown
    assert "\x1b]0" not in terminal.shown
