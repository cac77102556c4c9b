"""Features on disk: what comes back is what was put, whatever happened to the files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.generation.feature_cache import FeatureCache

LIMIT = 1 << 20
KEY = b"k" * 32


def features(seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 16)).astype(dtype)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_comes_back_is_what_was_put(tmp_path: Path, dtype: object) -> None:
    FeatureCache(tmp_path / "new", "bundle", LIMIT).put(KEY, features(dtype=dtype))
    cache = FeatureCache(tmp_path / "new", "bundle", LIMIT)
    found = cache.get(KEY)
    assert found is not None
    assert found.dtype == features(dtype=dtype).dtype
    assert found.tobytes() == features(dtype=dtype).tobytes()
    assert found.shape == (6, 16)
    assert (cache.hits, cache.misses, cache.corrupt) == (1, 0, 0)


def test_another_image_or_bundle_is_a_miss(tmp_path: Path) -> None:
    FeatureCache(tmp_path, "bundle", LIMIT).put(KEY, features())
    assert FeatureCache(tmp_path, "other", LIMIT).get(KEY) is None
    cache = FeatureCache(tmp_path, "bundle", LIMIT)
    assert cache.get(b"l" * 32) is None
    assert (cache.hits, cache.misses) == (0, 1)


def test_every_flipped_byte_is_noticed_and_rewritten(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "bundle", LIMIT)
    cache.put(KEY, features())
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    places = range(0, len(good), 7)
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert cache.get(KEY) is None
    assert cache.corrupt == len(places)
    for data in (b"", good[:20], good[:-1], good + b"x"):
        path.write_bytes(data)
        assert cache.get(KEY) is None
    cache.put(KEY, features(1))
    found = cache.get(KEY)
    assert found is not None
    assert found.tobytes() == features(1).tobytes()


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "bundle", LIMIT)
    keys = [bytes([index]) * 32 for index in range(6)]
    for age, key in enumerate(keys):
        cache.put(key, features())
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_ctime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert cache.get(keys[0]) is not None  # used now, so no longer the oldest
    limited = FeatureCache(tmp_path, "bundle", size * 2 // 3)
    assert [limited.get(key) is not None for key in keys] == [True, False, False, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= size * 2 // 3


def test_a_limit_is_kept_while_images_come(tmp_path: Path) -> None:
    one = len(features().tobytes()) + 300
    cache = FeatureCache(tmp_path, "bundle", 5 * one)
    for index in range(40):
        cache.put(bytes([index]) * 32, features(index))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * one
    assert cache.get(bytes([39]) * 32) is not None


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / "a.features.1.tmp", tmp_path / "b.features.2.tmp"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    FeatureCache(tmp_path, "bundle", LIMIT)
    assert list(tmp_path.iterdir()) == [new]


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two processes write and read the same 50 images under a limit that holds a few."""
    script = f"""
import sys, numpy as np
from pathlib import Path
from pixtral_runtime.generation.feature_cache import FeatureCache
cache = FeatureCache(Path({str(tmp_path)!r}), "bundle", 5000)
for turn in range(10):
    for index in range(50):
        expected = np.full((6, 16), index, np.float32)
        found = cache.get(bytes([index]) * 32)
        assert found is None or found.tobytes() == expected.tobytes()
        if found is None:
            cache.put(bytes([index]) * 32, expected)
            found = cache.get(bytes([index]) * 32)
            assert found is None or found.tobytes() == expected.tobytes()
assert not cache.corrupt
assert cache.hits > 100, cache.hits  # of 500: the other process may have pushed some out
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written") as raised:
        FeatureCache(tmp_path / "file" / "cache", "bundle", LIMIT)
    assert raised.value.options == (Option("embedding_cache", "another/folder"),)
