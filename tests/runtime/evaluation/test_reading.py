"""Letters that a model prefers, as transformers computes them, whatever was read before; and jobs that are resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from helpers.bundles import export_tiny
from helpers.reference import reference_logits
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.run import Tally, run_job
from pixtral_runtime.batch.worker import Worker
from pixtral_runtime.errors import BundleError, InputError
from pixtral_runtime.evaluation.reading import LETTERS, Letters
from pixtral_runtime.evaluation.run import Questions, evaluate
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tasks.registry import TASKS
from pixtral_runtime.generation.model import Model, load
from pixtral_runtime.inputs.conversation import user_message

TASK = TASKS["mmlu"]
SHARED = "The following are questions.\n\nWhat is red?\nAnswer: A\n\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf"), tiny_config(), format="hf", dtype=torch.float32)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


def examples(count: int) -> list[Example]:
    said = [f"{SHARED * (n % 3)}Question: {'why ' * n}{chr(97 + n)}" for n in range(count)]
    return [Example(str(n), user_message(text), ("A",)) for n, text in enumerate(said)]


def test_the_likeliest_letter_is_that_of_transformers(checkpoint: Path, bundle: Path, model: Model) -> None:
    kind: Any = LlavaForConditionalGeneration
    reference = kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    asked = [*examples(12), replace(examples(1)[0], id="again")]
    _, records = evaluate(bundle, Questions(TASK, asked))
    encode, letters = model.prompts.encode, Letters.of(model.prompts)
    for example in asked:
        prompt = model.prompts.plain([*encode(example.question), *letters.shared])
        logits = reference_logits(reference, prompt, [])[-1]
        assert records[example.id].answer == LETTERS[int(logits[list(letters.own)].argmax())]
    assert len({record.answer for record in records.values()}) > 1


def test_letters_are_tokens_of_the_answer_as_it_would_be_written(model: Model) -> None:
    letters = Letters.of(model.prompts)
    for letter, token in zip(LETTERS, letters.own, strict=True):
        assert model.prompts.detokenize([*letters.shared, token]).strip() == letter


class OneToken:
    """A tokenizer that tells no letters apart."""

    def __init__(self, model: Model) -> None:
        self.bundle = model.bundle

    def encode(self, text: str) -> list[int]:
        return [7, *([8] if text.endswith(tuple(LETTERS)) else [])]


def test_a_tokenizer_that_tells_no_letters_apart_is_refused(model: Model) -> None:
    prompts: Any = OneToken(model)
    with pytest.raises(BundleError, match="no token of its own for each of A, B, C, D"):
        Letters.of(prompts)


def test_a_question_that_is_too_long_is_an_error_of_its_own(bundle: Path) -> None:
    asked = examples(2)
    long = Example("long", user_message("why " * 5000), ("A",))
    evaluation, _ = evaluate(bundle, Questions(TASK, [asked[0], long, asked[1]]))
    assert [name for name, _ in evaluation.missing] == ["long"]
    assert len(evaluation.scored) == 2 and "the context holds" in evaluation.missing[0][1]


def test_a_job_goes_on_with_what_was_read_before(bundle: Path) -> None:
    asked = examples(4)
    _, whole = evaluate(bundle, Questions(TASK, asked))
    made: list[Record] = []

    def resumed(done: dict[str, Record]) -> Any:
        def answer(worker: Worker, requests: Any) -> Tally:
            return run_job(worker.job(requests, done), len(requests), on_record=lambda record, _: made.append(record))

        return answer

    evaluation, _ = evaluate(bundle, Questions(TASK, asked), answer=resumed({"0": whole["0"], "2": whole["2"]}))
    assert [record.id for record in made] == ["1", "3"] and evaluation.setting["kept"] == 2
    assert [record.answer for record in made] == [whole[record.id].answer for record in made]
    with pytest.raises(InputError, match="something else"):
        evaluate(bundle, Questions(TASK, asked), answer=resumed({"1": replace(whole["1"], asked="0" * 16)}))
