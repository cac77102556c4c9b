"""The demo checkpoint is a real model: what it answers through an exported bundle, and what it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_bundles import EIGHT_SLOTS, easy_vqa_questions
from helpers.bundles import export_tiny
from helpers.places import DATA
from pixtral_runtime import Model, load
from pixtral_runtime.evaluation.run import evaluate

CHECKPOINT = DATA / "tiny-pixtral"
IMAGES = sorted((DATA / "images").glob("*.png"))  # named COLOR_SHAPE_SIZE


@pytest.fixture(scope="module", params=["float32", "float16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(export_tiny(CHECKPOINT, tmp_path_factory.mktemp("bundles") / "demo", dtype=request.param))


def test_it_answers_the_benchmark(model: Model) -> None:
    questions = easy_vqa_questions(300)
    evaluation, records = evaluate(model.bundle.path, questions, EIGHT_SLOTS)
    assert evaluation.scores["exact"].mean >= 0.95  # of all 9,673: see docs/measurements.md
    assert len(records) == evaluation.rows == 300
    assert sum(example.references == ("yes",) for example in questions.examples) < 150


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_it_describes_pictures_of_every_size_and_aspect(model: Model, path: Path) -> None:
    color, shape, _ = path.stem.split("_")
    answer = model.generate("Describe this image in one short sentence.", [path])
    assert answer.text == f"A {color} {shape} on a light background."
    assert answer.finish_reason == "stop"


def test_it_tells_two_images_apart(model: Model) -> None:
    for first, second in zip(IMAGES, IMAGES[1:] + IMAGES[:1], strict=True):
        color, shape, _ = second.stem.split("_")
        assert model.generate("what shape is in the second image?", [first, second]).text == shape
        assert model.generate("what color is the shape in the second image?", [first, second]).text == color


def test_it_is_small_enough_to_be_committed() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10_000_000
