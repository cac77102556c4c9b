"""What a reasoning model thinks before it answers: its own field, in every output, and never part of the answer.

A tiny model gets the tokens of a script from the sampler, and the tokenizer of version 13.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.bundles import export_tiny, seal_again
from helpers.family import set_tokenizer_version
from helpers.places import DEMO, IMAGES
from pixtral_cli.main import app
from pixtral_runtime import Message, load
from pixtral_runtime.batch.records import Record
from pixtral_runtime.generation import scheduler
from pixtral_runtime.generation.json_schema import compile_schema
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.prompt import Piece, TextStream

PICTURE = IMAGES / "red_triangle_64x64.png"
EOS = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export_tiny(DEMO, tmp_path_factory.mktemp("thinking") / "bundle", dtype="float32")
    set_tokenizer_version(folder / "tekken.json", "v13")
    seal_again(folder)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that has no such tokens."""
    return export_tiny(DEMO, tmp_path_factory.mktemp("plain") / "bundle", dtype="float32")


def ids_of(model: Model, text: str) -> list[int]:
    return list(model.prompts.tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False))


def block(model: Model, thinking: str, answer: str) -> list[int]:
    """The tokens of a whole answer."""
    assert model.prompts.think_tokens is not None
    opens, closes = model.prompts.think_tokens
    return [opens, *ids_of(model, thinking), closes, *ids_of(model, answer), EOS]


def say(tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has these tokens."""

    class Script:
        def __init__(self, *_: object) -> None:
            self._left = iter(tokens)

        def __call__(self, logits: object) -> int:
            return next(self._left)

    monkeypatch.setattr(scheduler, "Sampler", Script)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_ids_are_those_of_the_tokenizer(model: Model, plain: Path) -> None:
    listed = json.loads(model.bundle.tokenizer_path.read_text(encoding="utf-8"))["special_tokens"]
    ranks = {token["token_str"]: token["rank"] for token in listed}
    assert model.prompts.think_tokens == (ranks["[THINK]"], ranks["[/THINK]"])
    assert load(plain).prompts.think_tokens is None


def test_an_answer_holds_what_comes_after_the_block(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = block(model, "red, three corners", "a triangle")
    say(tokens, monkeypatch)
    answer = model.generate("What?", PICTURE)
    assert (answer.thinking, answer.text, answer.finish_reason) == ("red, three corners", "a triangle", "stop")
    assert answer.token_ids == tuple(tokens)
    assert "".join(model.stream("What?", PICTURE)) == "a triangle"


def test_an_answer_that_is_cut_inside_the_block_has_no_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    say(block(model, "red, three corners", "a triangle"), monkeypatch)
    answer = model.generate("What?", PICTURE, max_new_tokens=3)
    assert (answer.text, answer.finish_reason) == ("", "length")
    assert answer.thinking
    assert "red, three corners".startswith(answer.thinking)
    assert list(model.stream("What?", PICTURE, max_new_tokens=3)) == []


def test_without_a_block_there_is_no_thinking(model: Model) -> None:
    opens, closes = model.prompts.think_tokens or (0, 0)
    said = ids_of(model, "a square")
    assert model.prompts.read_answer([*said, EOS]) == ("a square", None)
    assert model.prompts.read_answer([closes, *said]) == ("a square", None)  # nothing was opened
    assert model.prompts.read_answer([opens, closes, *said]) == ("a square", "")


def test_a_stream_tells_thinking_and_answer_apart_within_a_character(model: Model) -> None:
    stream = TextStream(model.prompts)
    tokens = block(model, "日本 🦩", "🪿 ok")
    pieces = [*map(stream.push, tokens), stream.flush()]
    text = {kind: "".join(p.text for p in pieces if p.is_thinking is kind) for kind in (True, False)}
    assert text == {True: "日本 🦩", False: "🪿 ok"}
    opens, closes = model.prompts.think_tokens or (0, 0)
    half = TextStream(model.prompts)
    first, *_ = ids_of(model, "🪿")
    assert [half.push(token) for token in (opens, first)] == [Piece(""), Piece("", True)]
    assert half.push(closes).is_thinking, "what was held back belongs to the block"


def test_every_output_of_a_job_has_the_two_apart(
    bundle: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(block(model, "three corners", "a triangle"), monkeypatch)
    out = tmp_path / "r.jsonl"
    done = invoke("run", bundle, PICTURE, "-o", out, "--format", "csv", "--report", tmp_path / "r.html")
    assert done.exit_code == 0, done.stderr
    record = json.loads(out.read_text())
    assert (record["answer"], record["thinking"]) == ("a triangle", "three corners")
    assert record["new_tokens"] == len(block(model, "three corners", "a triangle"))
    row = next(csv.DictReader((tmp_path / "r.csv").open(encoding="utf-8-sig")))
    assert (row["answer"], row["thinking"]) == ("a triangle", "three corners")
    assert '"thinking":"three corners"' in (tmp_path / "r.html").read_text()
    assert "a triangle" in done.stdout
    assert "three corners" not in done.stdout
    del record["seal"]
    assert Record.from_dict(record).thinking == "three corners"


def test_ask_prints_the_answer_and_shows_the_thinking_aside(
    bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(block(model, "three corners", "a triangle"), monkeypatch)
    done = invoke("ask", bundle, PICTURE)
    assert (done.stdout, done.stderr) == ("a triangle\n", "three corners\n")
    assert invoke("ask", bundle, PICTURE, "-q").stderr == ""
    document = json.loads(invoke("ask", bundle, PICTURE, "--json").stdout)
    assert (document["text"], document["thinking"]) == ("a triangle", "three corners")


def test_other_models_have_no_new_key(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert invoke("run", plain, PICTURE, "-o", out, "--format", "csv", "--max-new-tokens", 2).exit_code == 0
    record = json.loads(out.read_text())
    assert "thinking" not in record
    assert "thinking" not in (tmp_path / "r.csv").read_text(encoding="utf-8-sig").splitlines()[0]
    assert "thinking" not in json.loads(invoke("ask", plain, PICTURE, "--max-new-tokens", 2, "--json").stdout)
    del record["seal"]
    assert Record.from_dict(record).thinking is None


def test_a_score_is_of_the_answer_alone(
    bundle: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(PICTURE, tmp_path / "data" / "a.png")
    row = {"image": "a.png", "question": "What?", "answers": ["triangle"]}
    (tmp_path / "data" / "data.jsonl").write_text(json.dumps(row) + "\n")
    say(block(model, "is it a square?", "triangle"), monkeypatch)
    done = invoke("eval", bundle, "--task", "custom", "--data", tmp_path / "data", "--save", tmp_path / "s.json")
    assert done.exit_code == 0, done.stderr
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [one["answer"] for one in saved["examples"]] == ["triangle"]
    assert [next(iter(one["scores"].values())) for one in saved["examples"]] == [1.0]


def test_an_answer_by_a_schema_does_not_think(model: Model) -> None:
    """The schema holds from the first token on."""
    schema = compile_schema('{"type": "object", "properties": {}, "additionalProperties": false}', model.prompts, "s")
    opens, _ = model.prompts.think_tokens or (0, 0)
    assert not schema.constraint().allows(np.array([opens]))[0]


def test_a_system_prompt_may_show_a_block(model: Model, plain: Path) -> None:
    """As the cards of reasoning models do; what a user writes stays text, as it does without the tokens."""
    opens, closes = model.prompts.think_tokens or (0, 0)
    text = "Think first. [THINK]Your thoughts.[/THINK]Your answer."
    ids = model.prompts.build([Message("system", (text,)), Message("user", ("Hi",))]).token_ids.tolist()
    start = ids.index(opens)
    assert ids[start : ids.index(closes) + 1] == [opens, *ids_of(model, "Your thoughts."), closes]
    assert (ids.count(opens), ids.count(closes)) == (1, 1)
    assert not {opens, closes} & set(model.prompts.build([Message("user", (text,))]).token_ids.tolist())
    assert opens not in load(plain).prompts.build([Message("system", (text,)), Message("user", ("Hi",))]).token_ids
