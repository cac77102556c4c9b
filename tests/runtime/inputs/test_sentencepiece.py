"""Pixtral-Large's tokenizer: a SentencePiece model, with other ids for breaks and ends of pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import pixtral_export.checkpoint.tokenizer as tokenizer_file
from helpers.bundles import export_tiny
from helpers.family import MEMBERS
from helpers.reference import noise
from helpers.tiny import edit_json, refusal, write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_runtime import Message, Model, load
from pixtral_runtime.bundle.config import ImageTokens
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, open_bundle
from pixtral_runtime.errors import MissingPackageError, SettingError
from pixtral_runtime.evaluation.reading import Letters
from pixtral_runtime.generation.json_schema import compile_schema
from pixtral_runtime.generation.tool_choice import compile_tools
from pixtral_runtime.inputs.openai_messages import local_picture, parse_message
from pixtral_runtime.inputs.prompt import TextStream
from pixtral_runtime.inputs.text_windows import Text, text_windows
from pixtral_runtime.inputs.tools import parse_tools

FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_241114.model.v7m1"
IDS = ImageTokens(10, 14, 15)
_LARGE = MEMBERS["Pixtral-Large"]
CONFIG = replace(
    _LARGE,
    vision=replace(_LARGE.vision, image_size=1024),  # as the file's name says
    decoder=replace(_LARGE.decoder, vocab_size=32_768),
    image_tokens=IDS,
)


def pixtral_large(folder: Path, format: str = "mistral") -> Path:
    write_checkpoint(folder, CONFIG, format=format)
    (folder / "tekken.json").unlink()
    shutil.copyfile(FILE, folder / SENTENCEPIECE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("large")
    return load(export_tiny(pixtral_large(folder / "c"), folder / "b", dtype="float32"))


def test_the_bundle_holds_the_file_by_its_name(model: Model) -> None:
    assert model.bundle.tokenizer_path.read_bytes() == FILE.read_bytes()
    assert model.bundle.tokenizer_path.name == SENTENCEPIECE and "tekken.json" not in model.bundle.files


def test_the_golden_prompt_of_its_version(model: Model) -> None:
    """Specification section 4.6."""
    messages = [Message("system", ("Be nice.",)), Message("user", (noise(32, 16), "Hi"))]
    prompt = model.prompts.build(messages)
    assert prompt.token_ids.tolist() == [1, 16, 2507, 5939, 29491, 17, 3, 10, 10, 15, 16127, 4]
    assert prompt.image_tokens == 3 and (prompt.feature_index >= 0).sum() == 2


@pytest.mark.parametrize("text", ["A dark night.", " two  blanks\n\n", "Käse — 🧀 \t<0x0A>", "x"])
def test_windows_of_a_text_know_how_many_bytes_they_are(model: Model, text: str) -> None:
    windows = list(text_windows(model.prompts, Text("a", "a", text * 5), 9))
    assert sum(window.size_bytes for window in windows) == len((text * 5).encode())
    assert [token for window in windows for token in window.token_ids] == model.prompts.encode(text * 5)


def test_letters_are_tokens_as_they_follow_a_colon(model: Model) -> None:
    letters = Letters.of(model.prompts)
    question = model.prompts.encode("Answer:")
    for letter, token in zip("ABCD", letters.own, strict=True):
        assert [*question, *letters.shared, token] == model.prompts.encode(f"Answer: {letter}")


def test_ids_and_pixels_equal_mistral_commons_on_random_sizes(model: Model) -> None:
    theirs: Any = MistralTokenizer.v7(is_mm=True)
    random = np.random.default_rng(1)
    for width, height in random.integers(1, 400, (40, 2)):
        picture = noise(int(width), int(height))
        asked = UserMessage(content=[ImageChunk(image=picture), TextChunk(text="Was ist das, bitte?")])
        messages: list[Any] = [SystemMessage(content="Be nice."), asked]
        request: Any = ChatCompletionRequest(messages=messages)
        expected = theirs.encode_chat_completion(request)
        parts: Any = (picture, "Was ist das, bitte?")
        seen = model.prompts.build([Message("system", ("Be nice.",)), Message("user", parts)])
        assert seen.token_ids.tolist() == expected.tokens
        np.testing.assert_array_equal(seen.images[0], expected.images[0].astype(np.float32))


@pytest.mark.parametrize("text", ["Hello there, you  two.", "naïve café — 東京 🦊🦊", " begins with a space", "a\n\nb"])
def test_streamed_pieces_make_the_text(text: str, model: Model) -> None:
    """Bytes of characters that the vocabulary lacks are held back, and spaces between words are kept."""
    tokens: Any = model.prompts.tokenizer.instruct_tokenizer.tokenizer
    ids = tokens.encode(text, bos=False, eos=False)
    stream = TextStream(model.prompts)
    pieces = [stream.push(token).text for token in ids]
    assert "".join([*pieces, stream.flush().text]) == model.prompts.detokenize(ids)
    assert len([piece for piece in pieces if piece]) > 1


def test_it_answers_and_has_no_thoughts(model: Model) -> None:
    answer = model.generate("What is shown?", [noise(40, 30)], max_new_tokens=4)
    assert len(answer.token_ids) == 4 and model.prompts.think_tokens is None
    assert "".join(model.stream("What is shown?", [noise(40, 30)], max_new_tokens=4)) == answer.text


def test_a_schema_needs_the_other_kind(model: Model) -> None:
    with pytest.raises(SettingError, match="needs a tekken tokenizer"):
        compile_schema('{"type": "object"}', model.prompts, "s.json")


def test_tools_are_written_and_calls_are_read(model: Model) -> None:
    tools: Any = [{"type": "function", "function": {"name": "now", "description": "It", "parameters": {}}}]
    call = {"id": "VvvODy9mT", "type": "function", "function": {"name": "now", "arguments": '{"zone": "Łódź"}'}}
    conversation: Any = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "VvvODy9mT", "content": "noon"},
    ]
    request: Any = ChatCompletionRequest.from_openai(conversation, tools=tools)
    expected = MistralTokenizer.from_file(str(FILE)).encode_chat_completion(request).tokens
    messages = [parse_message(message, local_picture(Path())) for message in conversation]
    offered = parse_tools(tools)
    assert offered is not None
    assert model.prompts.build(messages, tools=offered).token_ids.tolist() == expected
    start = expected.index(model.prompts.call_tokens.call)
    answer = model.prompts.read_calling_answer(expected[start : expected.index(2, start) + 1])
    assert (answer.text, answer.tool_calls) == ("", messages[1].tool_calls)
    assert compile_tools(offered, model.prompts).constraint() is None
    with pytest.raises(SettingError, match="needs a tekken tokenizer"):
        compile_tools(replace(offered, choice="required"), model.prompts)


@pytest.mark.parametrize("format", ["hf", "hf-new"])
def test_ids_that_config_json_leaves_out_are_the_files(format: str, tmp_path: Path) -> None:
    opened = open_checkpoint(pixtral_large(tmp_path / "c", format))
    assert opened.config.image_tokens == IDS
    assert any("14 and 15" in warning for warning in opened.warnings)


def test_ids_that_differ_from_the_files_are_refused(tmp_path: Path) -> None:
    folder = pixtral_large(tmp_path / "c")
    edit_json(folder / "params.json", lambda data: data["vision_encoder"].update(image_break_token_id=16))
    assert "the ids 10, 14, 15; the model's configuration 10, 16, 15" in str(refusal(folder))


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = pixtral_large(tmp_path / "c")
    edit_json(folder / "params.json", lambda data: data.update(vocab_size=512))
    assert f"{SENTENCEPIECE} has 32768 tokens, the model only 512" in str(refusal(folder))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = pixtral_large(tmp_path / "c")
    (folder / SENTENCEPIECE).write_bytes(b"\n\x0e\n\x05<unk>")
    assert f"{SENTENCEPIECE} is no tokenizer that mistral-common can use" in str(refusal(folder))


def test_without_the_package_it_says_what_to_install(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pixtral_large(tmp_path / "c")
    monkeypatch.setattr(tokenizer_file, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError) as caught:
        open_checkpoint(folder)
    assert "pixtral[sentencepiece]" in caught.value.hint
    monkeypatch.setattr("pixtral_runtime.inputs.prompt.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError):
        load(open_bundle(model.bundle.path).path).generate("What?", max_new_tokens=1)
