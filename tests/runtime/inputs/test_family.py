"""Prompts of the Mistral 3 family against mistral-common: merged patches, and each version of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from helpers.bundles import exported
from helpers.family import MEMBERS, prompts_of_version
from helpers.tiny import write_checkpoint
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Message
from pixtral_runtime.bundle.manifest import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("small")
    return exported(write_checkpoint(folder / "c", MEMBERS["Mistral-Small-3.1"]), folder / "b", ExportSettings())


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_ids_and_pixels_equal_mistral_commons(version: str, bundle: Bundle, tmp_path: Path) -> None:
    prompts = prompts_of_version(bundle, tmp_path, version)
    reference = MistralTokenizer.from_file(str(tmp_path / "tekken.json"))
    random, text = np.random.default_rng(0), "What is shown?"
    for _ in range(75):
        width, height = random.integers(1, 600, 2)
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        prompt = prompts.build([Message("system", ("Be nice.",)), Message("user", (picture, text))])
        question = UserMessage(content=[ImageChunk(image=picture), TextChunk(text=text)])
        expected = reference.encode_chat_completion(
            ChatCompletionRequest(messages=[SystemMessage(content="Be nice."), question])
        )
        assert prompt.token_ids.tolist() == expected.tokens, (width, height)
        np.testing.assert_array_equal(prompt.images[0], expected.images[0])
    has_own_block = 17 in prompt.token_ids.tolist()
    assert has_own_block == (version != "v3"), "the system prompt has a block of its own from version 7 on"
