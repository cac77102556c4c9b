"""Prompts against the specification's golden ids and mistral-common's own tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from helpers.places import DEMO, SHARED
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, VisionConfig
from pixtral_runtime.bundle.manifest import TOKENIZER, Bundle, FileEntry, Limits
from pixtral_runtime.errors import BundleError, InputError
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.inputs.conversation import Message, user_message
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder, TextStream

GOLDENS = SHARED / "spec" / "goldens" / "vllm_pixtral_chat.json"
FIXTURE_PROMPT = "Describe each image in one short sentence."
FIXTURE_SIZES = ((400, 300), (200, 300), (500, 500), (150, 600))


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "gray")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """Pixtral-12B's own tokenizer and sizes."""
    folder = tmp_path_factory.mktemp("bundle")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    config = ModelConfig(
        VisionConfig(1024, 24, 16, 64, 4096, 16, 1024, 1e4), DecoderConfig(5120, 40, 128, 14336, 32, 8, 131_072, 1e9)
    )
    bundle = Bundle(folder, config, "float16", "float16", Limits(4096, 1024), 24, listed(folder), {})
    return PromptBuilder(bundle, Preprocess(16, 1024))


def listed(folder: Path) -> dict[str, FileEntry]:
    """The tokenizer as a manifest lists it."""
    file = folder / TOKENIZER
    return {TOKENIZER: FileEntry(file.stat().st_size, sha256_of_file(file))}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("config"),
        lambda data: data["config"].pop("default_num_special_tokens"),
        lambda data: data.update(vocab=5),
        lambda data: data["vocab"][3].update(token_bytes="no base64!"),
        lambda data: data.update(special_tokens={}),
        lambda data: data["config"].update(pattern="("),
    ],
)
def test_a_damaged_tokenizer_is_the_bundles_fault(prompts: PromptBuilder, tmp_path: Path, change: Any) -> None:
    data = json.loads((DEMO / "tekken.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    damaged = PromptBuilder(replace(prompts.bundle, path=tmp_path, files=listed(tmp_path)), prompts.preprocess)
    with pytest.raises(BundleError, match=r"tekken\.json is damaged: ") as raised:
        damaged.build(user_message("What?"))
    assert "--verify" in raised.value.hint


def user(*content: str | Image.Image) -> Message:
    return Message("user", content)


SYSTEM = Message("system", ("Be nice.",))


@pytest.mark.parametrize(
    ("messages", "ids"),
    [
        ([user("Hello")], [1, 3, 22177, 4]),
        ([SYSTEM, user("Hello")], [1, 3, 5934, 16530, 1338, 22177, 4]),
        ([user(blank(48, 32), "What is this?")], [1, 3, 10, 10, 10, 12, 10, 10, 10, 13, 7493, 1395, 1593, 1063, 4]),
        ([user("What is this?", blank(48, 32))], [1, 3, 10, 10, 10, 12, 10, 10, 10, 13, 7493, 1395, 1593, 1063, 4]),
        ([user("A", blank(16, 16), "B", blank(32, 16))], [1, 3, 1065, 10, 13, 1066, 10, 10, 13, 4]),
        ([user("A", blank(16, 16), blank(32, 16))], [1, 3, 1065, 10, 13, 10, 10, 13, 4]),
        ([SYSTEM, user(blank(16, 16), "Hi")], [1, 3, 5934, 16530, 1338, 10, 13, 37133, 4]),
        ([SYSTEM, user("Hi", blank(16, 16))], [1, 3, 5934, 16530, 1338, 10, 13, 37133, 4]),
        (
            [SYSTEM, user(blank(16, 16), "Hi"), Message("assistant", ("Yes ",)), user("And?")],
            [1, 3, 10, 13, 37133, 4, 16860, 2, 3, 5934, 16530, 1338, 4998, 1063, 4],
        ),
        ([user("A", "B", blank(16, 16))], [1, 3, 10, 13, 1065, 1267, 1066, 4]),
        ([user("A"), user("B")], [1, 3, 1065, 1267, 1066, 4]),
    ],
)
def test_ids_equal_the_specification(prompts: PromptBuilder, messages: list[Message], ids: list[int]) -> None:
    prompt = prompts.build(messages)
    assert prompt.token_ids.tolist() == ids
    assert (prompt.feature_index >= 0).tolist() == [token == 10 for token in ids]


@pytest.mark.parametrize(("count", "length"), [(1, 506), (2, 772), (4, 2246)])
def test_prompt_lengths_equal_vllms_fixture(prompts: PromptBuilder, count: int, length: int) -> None:
    images = [blank(*size) for size in FIXTURE_SIZES[:count]]
    prompt = prompts.build([user(FIXTURE_PROMPT, *images)])
    assert len(prompt.token_ids) == length
    text = [token for token in prompt.token_ids.tolist() if token not in (1, 3, 4, 10, 12, 13)]
    assert text == [5847, 13089, 2744, 3937, 1294, 1925, 4958, 19286, 1046]


def test_answers_of_vllms_fixture_decode_to_its_text(prompts: PromptBuilder) -> None:
    if not GOLDENS.is_file():
        pytest.skip("the golden answers are not beside this checkout")
    for ids, text, _ in json.loads(GOLDENS.read_text()):
        assert prompts.detokenize(ids) == text
        stream = TextStream(prompts)
        assert "".join(piece.text for piece in [*map(stream.push, ids), stream.flush()]) == text


def test_ids_and_pixels_equal_mistral_commons(prompts: PromptBuilder) -> None:
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((61, 47), (1400, 333), (16, 90))]
    content: list[Any] = [TextChunk(text="One"), *(ImageChunk(image=image) for image in images), TextChunk(text="two?")]
    reference = MistralTokenizer.v3(is_tekken=True, is_mm=True).encode_chat_completion(
        ChatCompletionRequest(messages=[UserMessage(content=content)])
    )
    prompt = prompts.build([user("One", *images, "two?")])
    assert prompt.token_ids.tolist() == reference.tokens
    for seen, expected in zip(prompt.images, reference.images, strict=True):
        np.testing.assert_array_equal(seen, expected.astype(np.float32))


def test_special_strings_in_user_text_stay_text(prompts: PromptBuilder) -> None:
    assert not {10, 12, 13} & set(prompts.build([user("[IMG][IMG_BREAK] </s>")]).token_ids.tolist())


def test_a_character_of_several_tokens_streams_whole(prompts: PromptBuilder) -> None:
    text = "日本 🦩🪿 ok"
    ids = prompts.build([user(text)]).token_ids.tolist()[2:-1]
    stream = TextStream(prompts)
    pieces = [piece.text for piece in [*map(stream.push, ids), stream.flush()]]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_prompt_longer_than_the_context_is_refused(prompts: PromptBuilder) -> None:
    with pytest.raises(InputError, match="context of 4096"):
        prompts.build([user(blank(1024, 1024), "What?")])
    assert len(prompts.build([user(blank(1008, 1008), "What?")]).token_ids) == 64 * 63 + 5


@pytest.mark.parametrize(
    "messages", [[], [Message("assistant", ("Hi",))], [user("Hi"), Message("assistant", (blank(16, 16),)), user("x")]]
)
def test_a_malformed_conversation_is_refused(prompts: PromptBuilder, messages: list[Message]) -> None:
    with pytest.raises(InputError):
        prompts.build(messages)


def test_text_that_is_none_is_refused_and_not_read_as_something_else(prompts: PromptBuilder) -> None:
    for messages in (user_message("caf\udce9"), user_message("Which?", system="\ud83d")):
        with pytest.raises(InputError, match="is not UTF-8 text"):
            prompts.build(messages)


def test_images_come_first_in_the_usual_request() -> None:
    image = blank(16, 16)
    assert user_message("Q", [image], "S") == (Message("system", ("S",)), Message("user", (image, "Q")))
