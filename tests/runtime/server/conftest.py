"""One model and one server for the tests that change nothing of either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.bundles import exported
from helpers.places import DEMO
from helpers.serving import Served, served
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return load(exported(DEMO, folder, ExportSettings(dtype="float32", max_context=600)).path)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Served]:
    with served(model) as running:
        yield running
