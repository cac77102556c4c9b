"""A folder run: records in input order, and broken files that stop nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from bundles import export_tiny
from pixtral_runtime import Model, load
from pixtral_runtime.image import decode_image
from pixtral_runtime.job import Job, run_job
from tiny import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())
    return load(export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    for name, size in (("a.png", (40, 20)), ("c.jpg", (500, 300))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    return [tmp_path / name for name in ("a.png", "b.png", "c.jpg", "gone.png")]


def test_each_image_gets_a_record_in_order(model: Model, pictures: list[Path]) -> None:
    job = Job("What is this?", max_new_tokens=5)
    records = list(run_job(model, pictures, job))
    assert [record.path for record in records] == [str(path) for path in pictures]
    assert [record.error is None for record in records] == [True, False, True, False]
    first = records[0]
    assert (first.width, first.height, first.image_tokens) == (40, 20, (3 + 1) * 2)
    assert first.sha256 == hashlib.sha256(pictures[0].read_bytes()).hexdigest()
    assert first.preprocess == "mistral"
    assert first.bundle == model.bundle.fingerprint
    assert set(first.times_ms) == {"image", "preprocess", "vision", "prefill", "decode"}
    expected = model.generate("What is this?", [pictures[0]], max_new_tokens=5)
    assert (first.answer, first.finish_reason) == (expected.text, expected.finish_reason)
    assert str(pictures[1]) in str(records[1].error)
    assert records[1].hint
    assert records[1].answer is None


def test_exif_can_be_left_alone(model: Model, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned, stored = (
        next(run_job(model, [tmp_path / "turned.jpg"], Job("?", max_new_tokens=1, apply_exif=apply)))
        for apply in (True, False)
    )
    assert (turned.width, turned.height, turned.exif_applied) == (32, 64, True)
    assert (stored.width, stored.height, stored.exif_applied) == (64, 32, False)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filters that image.py sets
def test_every_shared_picture_gives_an_answer_or_one_error(model: Model, shared_images: Path) -> None:
    paths = sorted(path for path in shared_images.iterdir() if path.suffix != ".tsv")
    records = {Path(r.path).name: r for r in run_job(model, paths, Job("?", max_new_tokens=1))}
    failed = {name for name, record in records.items() if record.error}
    assert len(records) == 36
    broken = {path.name for path in paths if not _decodes(path)}
    assert failed == broken
    assert {"nasty_photo.heic", "bad_truncated.jpg", "bomb_64kx64k.gif"} <= failed
    assert len(failed) <= 6


def _decodes(path: Path) -> bool:
    from pixtral_runtime.errors import ImageError

    try:
        decode_image(path.read_bytes(), path.name)
    except ImageError:
        return False
    return True
