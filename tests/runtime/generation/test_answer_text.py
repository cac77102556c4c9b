"""Stop strings, biases and log-probabilities: what a request may ask for beside its prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, Sampling, load
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.logits import token_logprob
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message

GREEDY = Sampling()
SAID = "one, two; three two"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return load(exported(DEMO, folder, ExportSettings(dtype="float32", max_context=600)).path)


def tokens_of(model: Model, text: str) -> list[int]:
    return model.prompts.tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)


def text_of(text: AnswerText) -> str:
    return "".join(piece.text for piece in text.pieces)


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        ((), SAID),
        (("two",), "one, "),
        (("three", "two; t"), "one, "),  # the one that stands first in the text, not in the list
        ((" two;", ";"), "one,"),
        (("x", "two two"), SAID),  # begins as the text ends, and is not there
        (("o",), ""),
    ],
)
def test_a_text_ends_before_its_first_stop_string(model: Model, stops: tuple[str, ...], said: str) -> None:
    text = AnswerText(model.prompts, stops)
    for token in tokens_of(model, SAID):
        text.push(token)
        assert said.startswith(text_of(text))  # nothing is told that would have to be taken back
        if text.is_stopped:
            break
    text.finish()
    assert text_of(text) == said
    assert text.is_stopped is (said != SAID)


def test_bytes_of_a_character_are_held_back_until_it_is_whole(model: Model) -> None:
    text = AnswerText(model.prompts, ("ß",))
    for token in tokens_of(model, "a Ü→€😀ßb"):
        text.push(token)
        assert "\N{REPLACEMENT CHARACTER}" not in text_of(text)
        if text.is_stopped:
            break
    assert text_of(text) == "a Ü→€😀"


def run(model: Model, generation: Generation, slots: int = 2) -> Generation:
    scheduler = Scheduler(model.bundle, model.runner, slots)
    scheduler.submit(generation)
    while scheduler.busy:
        scheduler.step()
    return generation


def test_a_generation_ends_at_a_stop_string(model: Model) -> None:
    prompt = model.prompts.build(user_message("is there a circle?"))
    whole = run(model, Generation(prompt, 6, GREEDY))
    said = model.prompts.detokenize(whole.token_ids)
    assert len(said) > 1
    text = AnswerText(model.prompts, (said[1:],))
    stopped = run(model, Generation(prompt, 60, GREEDY, text=text))
    assert stopped.finish_reason == "stop"
    assert text_of(text) == said[0]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_a_bias_decides_and_a_ban_holds(model: Model) -> None:
    prompt = model.prompts.build(user_message("is there a circle?"))
    free = run(model, Generation(prompt, 4, GREEDY))
    banned = run(model, Generation(prompt, 4, GREEDY, logit_bias={free.token_ids[0]: -100.0}))
    assert banned.token_ids[0] != free.token_ids[0]
    forced = run(model, Generation(prompt, 4, Sampling(1.0, 1.0, 3), logit_bias={77: 100.0}))
    assert forced.token_ids == [77] * 4


def test_log_probabilities_are_those_of_the_model_whatever_is_added(model: Model) -> None:
    prompt = model.prompts.build(user_message("is there a circle?"))
    generation = run(model, Generation(prompt, 5, GREEDY, logit_bias={77: 100.0}, top_logprobs=3))
    plain = run(model, Generation(prompt, 5, GREEDY, top_logprobs=3))
    assert [one.token_id for one in generation.logprobs] == generation.token_ids == [77] * 5
    first, free = generation.logprobs[0], plain.logprobs[0]
    assert first.top == free.top and len(first.top) == 3
    assert free.top[0] == (plain.token_ids[0], free.logprob)
    assert first.logprob < free.top[2][1]


def test_a_log_probability_is_that_of_a_softmax() -> None:
    logits = np.array([1.0, 3.0, 3.0, -2.0], np.float32)
    total = np.exp(logits.astype(np.float64)).sum()
    found = token_logprob(logits, 3, 2)
    assert found.logprob == pytest.approx(-2 - np.log(total))
    assert [token for token, _ in found.top] == [1, 2]  # of equals the first, as greedy decoding takes it
    assert token_logprob(logits, 0, 0).top == ()


def test_what_begins_again_has_nothing_twice(model: Model, tmp_path: Path) -> None:
    prompt = model.prompts.build(user_message("is there a circle?"))
    text = AnswerText(model.prompts)
    generation = run(model, Generation(prompt, 5, GREEDY, text=text, top_logprobs=0))
    said, tokens = text_of(text), list(generation.token_ids)
    generation.begin_again()
    assert not text.pieces and not generation.logprobs
    generation.finish_reason = None
    run(model, generation)
    assert (text_of(text), generation.token_ids, len(generation.logprobs)) == (said, tokens, len(tokens))
