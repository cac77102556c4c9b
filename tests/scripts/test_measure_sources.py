"""What is measured is the same pictures from everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from helpers.sources import contents, noise
from pixtral_runtime.sources.datasets import open_dataset

pytest.importorskip("pyarrow", reason="the extra `tables` brings it")


def test_all_places_hold_the_same_pictures(tmp_path: Path) -> None:
    from measure_sources import read_all, speed, write_folder, write_parquet, write_tar, write_zip

    pictures = [noise(100, n) for n in range(25)]
    write_folder(tmp_path / "photos", pictures)
    write_tar(tmp_path / "x.tar", pictures)
    write_zip(tmp_path / "x.zip", pictures)
    write_parquet(tmp_path / "x.parquet", pictures, 10)
    for name in ("x.tar", "x.zip", "x.parquet"):
        source = open_dataset(str(tmp_path / name))
        assert source is not None and list(contents(source).values()) == [[data] for data in pictures]
    assert [file.read_bytes() for file in sorted((tmp_path / "photos").iterdir())] == pictures
    assert {read_all(place) for place in tmp_path.iterdir()} == {25}
    (tmp_path / "speed").mkdir()
    found = speed(tmp_path / "speed", argparse.Namespace(pictures=5, kilobytes=1, runs=1))
    rates = found["pictures_per_s"]
    assert isinstance(rates, dict) and len(rates) == 5
