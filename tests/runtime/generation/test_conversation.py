"""A conversation: every answer is the one to all that was said, and what was read once is not read again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.bundles import export_tiny, seal_again
from helpers.family import set_tokenizer_version
from helpers.places import DEMO, IMAGES
from pixtral_runtime import Answer, Conversation, Message, Model, Sampling, load
from pixtral_runtime.backends.ort_caches import OrtCache
from pixtral_runtime.errors import ContextError, ImageError
from pixtral_runtime.generation import scheduler
from pixtral_runtime.inputs.image_files import open_image
from pixtral_runtime.inputs.preprocess import KeptPixels, Preprocess
from pixtral_runtime.inputs.prompt import Piece

BLUE, TEAL, RED = (IMAGES / f"{name}.png" for name in ("blue_circle_64x64", "teal_circle_128x64", "red_triangle_64x64"))
TURNS: tuple[tuple[str, list[Path]], ...] = (
    ("what color is the shape?", [BLUE]),
    ("is there a circle?", [TEAL, RED]),
    ("what shape is in the image?", []),
    ("Describe this image in one short sentence.", [BLUE]),
    ("is there a triangle?", []),
)
CONTROL_TOKENS = 4  # around a question, and at the end of the answer before it
EOS = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(DEMO, tmp_path_factory.mktemp("talk") / "bundle", dtype="float32")


@pytest.fixture(scope="module")
def fresh(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture
def model(bundle: Path) -> Model:
    return load(bundle)


def say(tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has these tokens."""

    class Script:
        def __init__(self, *_: object) -> None:
            self._left = iter(tokens)

        def __call__(self, logits: object) -> int:
            return next(self._left)

    monkeypatch.setattr(scheduler, "Sampler", Script)


def unread(model: Model, messages: Sequence[Message]) -> Answer:
    """The answer to a conversation of which the cache holds nothing."""
    model.generate("x", max_new_tokens=1)
    answer = model.generate(messages)
    assert answer.reused_tokens <= 3  # how each prompt begins
    return answer


def test_answers_are_those_to_the_whole_conversation_and_nothing_is_read_twice(model: Model, fresh: Model) -> None:
    conversation = Conversation(model)
    seen, before = 0, ""
    for text, images in TURNS:
        answer = conversation.ask(text, images)
        assert unread(fresh, conversation.messages[:-1]) == answer
        new_image_tokens, seen = answer.image_tokens - seen, answer.image_tokens
        new = sum(len(model.prompts.encode(words)) for words in (text, before))  # an answer may be tokenized anew
        assert answer.prompt_tokens - answer.reused_tokens - new_image_tokens <= new + CONTROL_TOKENS
        before = answer.text
        assert (answer.times.vision_ms > 0) == (conversation.turns <= 2)
        assert conversation.messages[-1] == Message("assistant", (answer.text,))
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 5
    assert answer.image_tokens > 350 and answer.finish_reason == "stop"


def test_pictures_of_all_turns_are_scaled_and_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[Image.Image] = []
    encoded: list[Any] = []
    scale, encode = Preprocess.__call__, model.runner.encode

    def noted(self: Preprocess, image: Image.Image) -> Any:
        scaled.append(image)
        return scale(self, image)

    def counted(images: Any) -> Any:
        encoded.extend(images)
        return encode(images)

    monkeypatch.setattr(Preprocess, "__call__", noted)
    monkeypatch.setattr(model.runner, "encode", counted)
    conversation = Conversation(model)
    for text, images in TURNS:
        conversation.ask(text, images)
    assert (len(scaled), len(encoded)) == (4, 3), "four were shown, of which two are the same"


def test_what_was_shown_stays_as_it_was(model: Model, fresh: Model) -> None:
    picture = open_image(BLUE)
    before = picture.copy()
    conversation = Conversation(model)
    conversation.ask("what color is the shape?", picture)
    picture.paste(open_image(RED))
    answer = conversation.ask("what color is the shape?", picture)
    shown = [part for message in conversation.messages for part in message.content if isinstance(part, Image.Image)]
    assert shown == [before, picture] and before != picture
    assert unread(fresh, conversation.messages[:-1]) == answer


def test_pixels_are_kept_as_long_as_their_picture() -> None:
    kept, picture = KeptPixels(), open_image(BLUE)
    pixels = np.zeros((3, 16, 16), np.float32)
    kept.put(picture, pixels)
    assert kept.get(picture) is pixels
    assert kept.get(picture.copy()) is None
    weak = weakref.ref(picture)
    del picture
    assert weak() is None and not kept._kept


def test_a_system_prompt_goes_in_front_and_may_change(model: Model, fresh: Model) -> None:
    conversation = Conversation(model, system="Be brief.", max_new_tokens=8)
    conversation.ask("what color is the shape?", BLUE)
    conversation.system = "Say more."
    answer = conversation.ask("is there a circle?")
    assert conversation.messages[0] == Message("system", ("Say more.",))
    assert unread(fresh, conversation.messages[:-1]).token_ids[:8] == answer.token_ids


def test_turns_are_forgotten_from_either_end(model: Model, fresh: Model) -> None:
    conversation = Conversation(model)
    for text, images in TURNS[:4]:
        conversation.ask(text, images)
    everything = conversation.messages
    assert conversation.undo() and conversation.messages == everything[:-2]
    assert conversation.forget_oldest() and conversation.messages == everything[2:-2]
    answer = conversation.ask(*TURNS[4])
    assert unread(fresh, conversation.messages[:-1]) == answer
    conversation.reset()
    assert (conversation.turns, conversation.messages) == (0, ())
    assert not conversation.undo() and not conversation.forget_oldest()
    assert conversation.ask("what color is the shape?", BLUE) == unread(fresh, conversation.messages[:-1])


def endless() -> Sampling:
    return Sampling(temperature=50.0, top_p=1.0, seed=1)  # as good as never the end


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went(model: Model, fresh: Model) -> None:
    conversation = Conversation(model, max_new_tokens=500, sampling=endless())
    pieces = []
    for piece in conversation.pieces("what color is the shape?", BLUE):
        pieces.append(piece.text)
        if len(pieces) == 5:
            assert conversation.stop()
    assert not conversation.stop(), "there is none under way"
    said = "".join(pieces)
    assert conversation.last_answer is not None
    assert conversation.last_answer.finish_reason == "cancelled"
    assert conversation.last_answer.text == said
    assert 5 <= len(conversation.last_answer.token_ids) < 50
    assert conversation.messages[-1] == Message("assistant", (said,))
    conversation.sampling = Sampling()
    conversation.max_new_tokens = 128
    answer = conversation.ask("is there a circle?")
    assert answer.reused_tokens >= conversation.last_answer.image_tokens
    assert unread(fresh, conversation.messages[:-1]) == answer


def test_who_stops_reading_stops_the_answer(model: Model) -> None:
    conversation = Conversation(model, max_new_tokens=500, sampling=endless())
    stream: Any = conversation.stream("what color is the shape?", BLUE)
    first = next(stream)
    del stream
    assert conversation.messages[-1] == Message("assistant", (first,))
    assert not conversation.stop()


@pytest.mark.parametrize("stage", ["encode", "prefill_chunk"])
def test_an_answer_can_be_stopped_before_it_begins(stage: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(model)
    calls: list[bool] = []
    work = getattr(model.runner, stage)

    def stopped(*arguments: Any, **settings: Any) -> Any:
        calls.append(conversation.stop())
        return work(*arguments, **settings)

    images = [open_image(path).resize(size) for path, size in ((BLUE, (128, 128)), (TEAL, (136, 128)))]
    with monkeypatch.context() as patch:
        patch.setattr(model.runner, stage, stopped)
        assert conversation.ask("what color is the shape?", images).text == ""
    assert calls == [True], "neither the second picture nor the second chunk of the prompt was worked on"
    assert conversation.messages == ()
    assert conversation.ask("what color is the shape?", images) == load(model.bundle.path).generate(
        "what color is the shape?", images
    )


def test_after_an_interrupt_at_any_place_rows_are_not_trusted(
    model: Model, fresh: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(model)
    conversation.ask("what color is the shape?", BLUE)
    hold = OrtCache._hold

    def interrupted(self: OrtCache, arrays: Any) -> None:
        for array in arrays:
            array[:] = 0
        raise KeyboardInterrupt

    monkeypatch.setattr(OrtCache, "_hold", interrupted)  # the cache grows for two more pictures
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("is there a circle?", [TEAL, RED])
    monkeypatch.setattr(OrtCache, "_hold", hold)
    assert conversation.turns == 1
    answer = conversation.ask("is there a circle?", [TEAL, RED])
    assert answer.reused_tokens == 0
    assert unread(fresh, conversation.messages[:-1]) == answer


def test_a_question_that_fails_changes_nothing(model: Model, tmp_path: Path) -> None:
    conversation = Conversation(model)
    conversation.ask("what color is the shape?", BLUE)
    before = conversation.messages
    with pytest.raises(ContextError):
        conversation.ask("a " * 2000)
    with pytest.raises(ImageError):
        conversation.ask("what color is the shape?", tmp_path / "absent.png")
    assert conversation.messages == before
    assert conversation.ask("is there a circle?").reused_tokens > 80


def test_a_question_without_an_answer_is_not_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(model)
    with monkeypatch.context() as patch:
        say([EOS], patch)
        assert conversation.ask("what color is the shape?", BLUE).text == ""
    assert conversation.messages == ()
    assert conversation.ask("what color is the shape?", BLUE).text == "blue"


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = export_tiny(DEMO, tmp_path_factory.mktemp("reasoning") / "bundle", dtype="float32")
    set_tokenizer_version(folder / "tekken.json", "v13")
    seal_again(folder)
    return load(folder)


def test_thoughts_are_told_apart_and_not_sent_back(reasoning: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasoning.prompts.think_tokens is not None
    opens, closes = reasoning.prompts.think_tokens
    thought, said = (reasoning.prompts.encode(text) for text in ("three corners", "a triangle"))
    say([opens, *thought, closes, *said, EOS], monkeypatch)
    conversation = Conversation(reasoning)
    pieces = list(conversation.pieces("what shape is it?", RED))
    assert {piece.is_thinking for piece in pieces} == {True, False}
    assert conversation.messages[-1] == Message("assistant", ("a triangle",))
    assert conversation.last_answer is not None
    assert (conversation.last_answer.text, conversation.last_answer.thinking) == ("a triangle", "three corners")
    assert "".join(conversation.stream("and now?")) == "a triangle"
    prompt = reasoning.prompts.build(conversation.messages[:-1])
    assert opens not in prompt.token_ids
    say([opens, *thought], monkeypatch)
    for piece in conversation.pieces("still?"):
        assert piece == Piece(piece.text, is_thinking=True)
        conversation.stop()
    assert conversation.turns == 2, "nothing was said yet"
