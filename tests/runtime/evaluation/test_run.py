"""A whole evaluation without a terminal: who answers can be handed in, and what nobody answered or rated says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.bundles import export_tiny
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.batch.run import Tally
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.evaluation.run import EvaluationOptions, Questions, evaluate
from pixtral_runtime.evaluation.task import BrokenRow, Example, Task
from pixtral_runtime.inputs.conversation import user_message

OPTIONS = EvaluationOptions(max_image_side=64, worker=WorkerOptions(batch=2))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())
    return export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32")


def questions(*metrics: str) -> Questions:
    task = Task("custom", "", "", "", 4, metrics, (), lambda row, number, save: [])
    examples = [Example(name, user_message(f"what is {name}?"), ("yes",), "") for name in ("a", "b")]
    return Questions(task, examples, (BrokenRow("c", "no picture"),))


def answers_to_a(worker: Worker, asked: Sequence[Request]) -> Tally:
    assert [request.max_new_tokens for request in asked] == [4, 4]
    answered = Record("a", "q", "0" * 16, answer="yes", finish_reason="stop")
    return Tally(len(asked), kept=1, records={"a": answered})


def test_a_bundle_answers_by_itself_and_the_setting_says_how(bundle: Path) -> None:
    evaluation, records = evaluate(bundle, questions("exact"), OPTIONS)
    assert set(records) == {"a", "b"}
    assert [name for name, _ in evaluation.missing] == ["c"]
    assert evaluation.scores["exact"].n == 2
    shown = {name: evaluation.setting[name] for name in ("bundle", "max_new_tokens", "max_image_side", "judge")}
    assert shown == {"bundle": str(bundle), "max_new_tokens": 4, "max_image_side": 64, "judge": None}


def test_answers_come_from_whom_the_caller_names(bundle: Path) -> None:
    evaluation, _ = evaluate(bundle, questions("exact"), OPTIONS, answer=answers_to_a)
    assert evaluation.scores["exact"].mean == 1 and evaluation.setting["kept"] == 1
    assert evaluation.missing == [("c", "no picture"), ("b", "not answered")]


def test_without_a_judge_answers_stay_unrated(bundle: Path, tmp_path: Path) -> None:
    evaluation, _ = evaluate(bundle, questions(), OPTIONS, ratings=tmp_path / "r.jsonl", answer=answers_to_a)
    assert not evaluation.scores and not (tmp_path / "r.jsonl").exists()
    assert ("a", "not rated: the judge was not asked") in evaluation.missing
