"""Perplexity of texts: windows, numbers as transformers', weights, and the verdict on two bundles."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from helpers.bundles import export_tiny
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_runtime.batch.worker import WorkerOptions
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.errors import InputError, SettingError
from pixtral_runtime.evaluation.comparison import compare_evaluations
from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.reading import windows_of
from pixtral_runtime.evaluation.result import Evaluation, Scored
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.run import EvaluationOptions, Questions, evaluate
from pixtral_runtime.evaluation.tasks.registry import TASKS
from pixtral_runtime.generation.model import load
from pixtral_runtime.generation.text_reading import text_nats
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

TASK = TASKS["perplexity"]
WINDOW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf"), tiny_config(), format="hf", dtype=torch.float32)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("It was a dark night; the rain fell in torrents.\n\nNobody — nobody! — slept.\n" * 3)
    (folder / "more" / "b.md").write_text("# Käse\n\n* 1 kg\n")
    lines = [json.dumps({"text": "A text of a line."}), json.dumps({"title": "none"}), "", "{", '{"text": ""}']
    (folder / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "d.csv").write_text("no text")
    return folder


def questions(place: Path, **more: Any) -> Questions:
    found, broken = read_examples(TASK, place, ImageStore(place, place), None)
    return Questions(TASK, found, broken, window=WINDOW, **more)


def test_texts_are_files_and_lines_and_what_is_none_is_listed(texts: Path) -> None:
    asked = questions(texts)
    assert [example.id for example in asked.examples] == ["a.txt", "c.jsonl:1", "more/b.md"]
    assert [row.id for row in asked.broken_rows] == ["c.jsonl:2", "c.jsonl:4", "c.jsonl:5"]
    assert [example.id for example in questions(texts / "more" / "b.md").examples] == ["b.md"]
    with pytest.raises(InputError, match=r"no \.txt, \.md or \.jsonl"):
        questions(texts / "d.csv")
    with pytest.raises(InputError, match="is not there"):
        questions(texts / "absent")


def test_windows_hold_every_token_of_a_text_once(texts: Path, bundle: Path) -> None:
    opened = open_bundle(bundle)
    prompts = PromptBuilder(opened, default_preprocess(opened))
    for example in questions(texts).examples:
        windows = list(windows_of(prompts, [example], WINDOW))
        tokens = [token for window in windows for token in window.details["token_ids"]]
        assert tokens == prompts.encode(example.question)
        assert sum(window.details["bytes"] for window in windows) == len(example.question.encode())
        assert {len(window.details["token_ids"]) for window in windows[:-1]} <= {WINDOW - 1}
    for size in (1, 10**6):
        with pytest.raises(SettingError, match="a window of"):
            list(windows_of(prompts, [example], size))


def test_perplexity_is_that_of_transformers(checkpoint: Path, bundle: Path, texts: Path) -> None:
    evaluation, records = evaluate(bundle, questions(texts))
    kind: Any = LlavaForConditionalGeneration
    reference = kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    opened = open_bundle(bundle)
    prompts = PromptBuilder(opened, default_preprocess(opened))
    nats = tokens = size = 0.0
    for example in questions(texts).examples:
        ids, text = prompts.encode(example.question), example.question
        size += len(text.encode())
        for first in range(0, len(ids), WINDOW - 1):
            window = torch.from_numpy(prompts.plain(ids[first : first + WINDOW - 1]).token_ids[None])
            with torch.inference_mode():
                loss = float(reference(input_ids=window, labels=window).loss)  # the mean over all but <s>
            nats, tokens = nats + loss * (window.shape[1] - 1), tokens + window.shape[1] - 1
    assert evaluation.scores["perplexity"].mean == pytest.approx(math.exp(nats / tokens), rel=1e-5)  # 3e-7 seen
    assert evaluation.scores["bits_per_byte"].mean == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert len(evaluation.scored) == len(records) > 4
    assert evaluation.setting["window"] == WINDOW


def test_engines_that_give_few_logits_at_a_time_read_token_by_token(bundle: Path) -> None:
    model = load(bundle)
    prompt = model.prompts.plain(model.prompts.encode("Nobody slept, and the rain fell in torrents. " * 30))
    assert len(prompt.token_ids) > model.runner.sessions.chunk
    expected = text_nats(model, prompt, model.runner.sessions.decoder.new_cache(1, 1))
    model.runner.sessions = replace(model.runner.sessions, slots=1)
    seen = text_nats(model, prompt, model.runner.sessions.decoder.new_cache(1, 1))
    assert len(seen) == len(prompt.token_ids) - 1
    np.testing.assert_allclose(seen, expected, atol=1e-4)  # 4e-6 seen


def test_windows_are_as_many_as_wanted_and_limits_are_no_texts(bundle: Path, texts: Path) -> None:
    evaluation, _ = evaluate(bundle, questions(texts, windows=2), EvaluationOptions(worker=WorkerOptions(batch=4)))
    assert [example.id for example in evaluation.examples] == ["a.txt@0", f"a.txt@{WINDOW - 1}"]


def made(nats: list[float], tokens: int = 100) -> Evaluation:
    weights = {"nats_per_token": float(tokens)}
    examples = [
        Scored(f"a@{n}", "text", (), "a", "{}", "stop", {"nats_per_token": value}, weights=weights)
        for n, value in enumerate(nats)
    ]
    return Evaluation("perplexity", {"bundle": "b"}, examples)


def test_long_windows_count_for_more() -> None:
    short, long = made([1.0], 10).examples, made([2.0], 30).examples
    evaluation = Evaluation("perplexity", {}, [short[0], long[0]])
    assert evaluation.scores["nats_per_token"].mean == pytest.approx(1.75)
    assert evaluation.scores["perplexity"].mean == pytest.approx(math.exp(1.75))
    assert not evaluation.is_share


def test_a_higher_perplexity_is_worse_and_only_a_clear_one_is_a_loss() -> None:
    random = np.random.default_rng(0)
    before = random.normal(2, 0.3, 60)
    for change, regressed in ((0.05, True), (0.005, False), (-0.05, False)):
        after = before + change + random.normal(0, 0.001, 60)
        found = compare_evaluations(made(list(before)), made(list(after)))
        headline = found.changes["nats_per_token"]
        assert headline.significant and found.regressed == regressed
        assert (headline.worse, headline.better) == ((60, 0) if change > 0 else (0, 60))
        percent = 100 * abs(math.exp(headline.difference) - 1)
        assert f"{'worse' if change > 0 else 'better'} by {percent:.2f} % of the perplexity" in found.verdict
        low, high = (100 * (math.exp(bound) - 1) for bound in (headline.low, headline.high))
        assert f"({low:+.2f} to {high:+.2f} %, p = " in found.verdict
    same = compare_evaluations(made(list(before)), made(list(before)))
    assert "no difference can be shown" in same.verdict and not same.regressed
