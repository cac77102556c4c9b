"""What the Python API takes, and what it says of anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.bundles import export_tiny
from helpers.places import DEMO, IMAGES
from pixtral_runtime import Message, Model, load
from pixtral_runtime.errors import ImageError, InputError, RequestError, SettingError

QUESTION = "What is shown?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(DEMO, tmp_path_factory.mktemp("b") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


def test_one_image_is_a_list_of_one_however_it_comes(model: Model) -> None:
    path = sorted(IMAGES.glob("*.png"))[0]
    picture = Image.open(path).convert("RGB")
    expected = model.generate(QUESTION, [path]).token_ids
    sources: list[Any] = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    sources += [[source] for source in sources] + [(source for source in [path])]
    assert [model.generate(QUESTION, source).token_ids for source in sources] == [expected] * len(sources)
    assert expected != model.generate(QUESTION).token_ids


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (5, "int is not taken"),
        ([None], "NoneType is not taken"),
        ([[]], "list is not taken"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\) is not taken"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\) is not taken"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \(0, 4, 3\) is not taken"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \(3, 4, 4\) is not taken"),
    ],
)
def test_what_is_no_image_is_named(model: Model, images: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        model.generate(QUESTION, images)


@pytest.mark.parametrize("prompt", [None, b"What?", ["What?"], 7])
def test_what_is_no_prompt_is_named(model: Model, prompt: Any) -> None:
    with pytest.raises(RequestError, match=type(prompt).__name__):
        model.generate(prompt)


def test_images_beside_messages_are_not_dropped(model: Model) -> None:
    messages = [Message("user", (QUESTION,))]
    for beside in ({"images": [next(IMAGES.glob("*.png"))]}, {"system": "Be brief."}):
        with pytest.raises(RequestError, match="go with a prompt of text"):
            model.generate(messages, **beside)
    assert model.generate(messages).token_ids == model.generate(QUESTION).token_ids


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_new_tokens": "3"}, "an answer of '3' tokens"),
        ({"max_new_tokens": 2.5}, "an answer of 2.5 tokens"),
        ({"sampling": "greedy"}, "sampling is 'greedy'"),
        ({"system": 5}, "int in a message"),
    ],
)
def test_what_is_of_another_type_is_named(model: Model, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        model.generate(QUESTION, **changed)


@pytest.mark.parametrize(("path", "threads"), [(5, 0), (None, 0), ("bundle", "2"), ("bundle", None)])
def test_what_is_no_path_or_number_of_threads_is_named(bundle: Path, path: Any, threads: Any) -> None:
    with pytest.raises(InputError, match=r"is no path|threads are outside"):
        load(bundle if path == "bundle" else path, threads=threads)


@pytest.mark.parametrize("limit", [0, -1])
def test_an_answer_has_a_token_or_more(model: Model, limit: int) -> None:
    with pytest.raises(SettingError, match=f"an answer of {limit} tokens") as caught:
        model.generate(QUESTION, max_new_tokens=limit)
    assert caught.value.hint.startswith("max_new_tokens=128")
    with pytest.raises(SettingError):
        list(model.stream(QUESTION, max_new_tokens=limit))


@pytest.mark.parametrize("threads", [-1, 99_999_999_999])
def test_threads_are_a_number_that_a_machine_has(bundle: Path, threads: int) -> None:
    with pytest.raises(InputError, match=f"{threads} threads are outside"):
        load(bundle, threads=threads)
