"""Inputs that would take more memory or time than there is: refused by their size, before they are read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from helpers.places import DEMO
from helpers.tiny import tiny_config
from pixtral_runtime.bundle.manifest import TOKENIZER, Bundle, FileEntry, Limits
from pixtral_runtime.errors import ContextError, ImageError
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.inputs import image as image_module
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image import decode_image, stored_size
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES, read_image_file
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of memory that are left, as the system says."""
    said = [1_000_000_000]
    monkeypatch.setattr(image_module, "available_memory_bytes", lambda: said[0])
    return said


@pytest.mark.parametrize("name", ["pipe.png", "/dev/zero", "/dev/null"])
def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="it is a pipe or a device"):
        read_image_file(tmp_path / name)
    assert stored_size(tmp_path / name) is None


def test_a_file_is_measured_before_it_is_read(tmp_path: Path, left: list[int]) -> None:
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", LARGEST_FILE_BYTES + 1)  # of holes
    with pytest.raises(ImageError, match=f"{LARGEST_FILE_BYTES + 1:,} bytes, expected {LARGEST_FILE_BYTES:,} at most"):
        read_image_file(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 900_000_000)
    left[0] = 800_000_000
    with pytest.raises(ImageError, match=r"a\.png: some 0\.9 GB to read it, and 0\.8 GB of memory are left"):
        read_image_file(tmp_path / "a.png")


def test_a_picture_beyond_the_memory_that_is_left_is_refused_by_its_header(left: list[int]) -> None:
    bomb = png(4000, 2000)  # 8 million pixels in some kilobytes
    left[0] = 200_000_000
    with pytest.raises(ImageError, match=r"bomb: 4000 x 2000 pixels: some 0\.2 GB to read it, and 0\.2 GB of memory"):
        decode_image(bomb, "bomb")
    left[0] = 300_000_000
    assert decode_image(bomb, "no bomb").pixels.size == (4000, 2000)


def test_small_pictures_are_read_however_little_is_left(left: list[int]) -> None:
    left[0] = 0
    assert decode_image(png(40, 20), "small").pixels.size == (40, 20)


def test_memory_that_runs_out_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_module, "_to_rgb", fail)
    with pytest.raises(ImageError, match="too little memory"):
        decode_image(png(4, 4), "picture")


@pytest.fixture
def prompts() -> PromptBuilder:
    """For a context of 64 tokens."""
    path = DEMO / TOKENIZER
    files = {TOKENIZER: FileEntry(path.stat().st_size, sha256_of_file(path))}
    bundle = Bundle(DEMO, tiny_config(), "float32", "float32", Limits(64, 256), 24, files, {})
    return PromptBuilder(bundle, Preprocess(16, 256))


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    prompts: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = prompts._longest_token_bytes
    assert longest == 16
    monkeypatch.setattr(prompts.tokenizer, "encode_chat_completion", lambda _: pytest.fail("it was tokenized"))
    with pytest.raises(ContextError, match=r"50,000,000 bytes of text, more than .* context of 64 holds"):
        prompts.build(user_message("a " * 25_000_000, []))


def test_a_text_of_long_tokens_is_not_refused_for_its_bytes(prompts: PromptBuilder) -> None:
    piece = max(prompts.tokenizer.instruct_tokenizer.tokenizer.vocab()[32:], key=lambda text: len(text.encode()))
    prompt = prompts.build(user_message(piece * 40, []))
    assert len(prompt.token_ids) < 64 < 40 * len(piece.encode()) / 4
