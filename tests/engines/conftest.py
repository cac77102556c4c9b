"""The demo checkpoint's bundle, which tests of builds and of what stands before them share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime.bundle.manifest import Bundle, open_bundle


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("plain") / "b", ExportSettings(max_context=512))


@pytest.fixture
def copy(plain: Bundle, tmp_path: Path) -> Bundle:
    """A bundle that a test may spoil."""
    shutil.copytree(plain.path, tmp_path / "b")
    return open_bundle(tmp_path / "b")
