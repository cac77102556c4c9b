"""A decoder as several engines, over stand-ins: the answers of one, no copy more, and no wrong cache or feed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO, IMAGES
from helpers.trt_engines import PLAIN, engines, hidden_of, step_feeds
from helpers.trt_standin import StandIn
from helpers.trt_surface import RTX_1_7, SURFACES
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_bundle import TrtParts
from pixtral_runtime.backends.trt_session import TrtSettings
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import ContextError, EngineError, InputError

PICTURE = IMAGES / "red_triangle_64x64.png"
CUTS = (1, 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


def answer(model: Model) -> tuple[int, ...]:
    return model.generate("what is it?", [PICTURE], max_new_tokens=4).token_ids


@pytest.mark.parametrize("package", list(SURFACES))
def test_parts_answer_as_one_engine_does_with_every_package(
    package: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trt = StandIn(HostDevice(), package)
    model = engines(trt, bundle, TrtSettings(cuda_graphs=True), cuts=CUTS)
    decoder = model.runner.sessions.decoder
    assert isinstance(decoder, TrtParts)
    assert answer(model) == answer(load(bundle.path))
    assert bool(decoder.graph_use.replayed) == (package != RTX_1_7) and not decoder.graph_use.refused
    assert {context.graph for context in trt.contexts} >= {"decoder.1", "decoder.2", "decoder.3"}


class CountingDevice(HostDevice):
    def copy_to_device(self, address: int, array: Array) -> None:
        self.calls["copy_to_device"] += 1
        super().copy_to_device(address, array)

    def copy_within(self, target: int, source: int, nbytes: int) -> None:
        self.calls["copy_within"] += 1
        super().copy_within(target, source, nbytes)


def test_a_step_through_parts_copies_what_one_through_a_whole_decoder_does(bundle: Bundle) -> None:
    seen: list[tuple[Counter[str], Array]] = []
    for cuts in ((), CUTS):
        device = CountingDevice()
        decoder = engines(StandIn(device), bundle, PLAIN, cuts=cuts).runner.sessions.decoder
        cache = decoder.new_cache(2, 64)
        feeds = step_feeds(bundle, hidden_of(bundle, 2, 1), np.array([[3], [5]]))
        decoder.run(feeds, cache)
        before = device.calls.copy()
        logits = decoder.run(feeds, cache)["logits"].numpy()
        seen.append((device.calls - before, logits))
    (whole, expected), (parts, logits) = seen
    assert parts == whole and whole["copy_to_device"] == len(feeds)
    np.testing.assert_array_equal(logits, expected)


def test_wrong_feeds_and_caches_are_refused(bundle: Bundle) -> None:
    model = engines(StandIn(HostDevice()), bundle, PLAIN, cuts=CUTS)
    decoder = model.runner.sessions.decoder
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.array([[3]]))
    cache = decoder.new_cache(1, 64)
    with pytest.raises(InputError, match="needs a cache"):
        decoder.run(feeds)
    for wrong in ({**feeds, "odd": feeds["hidden"]}, {name: feeds[name] for name in feeds if name != "write_index"}):
        with pytest.raises(InputError, match=r"missing or unknown: (odd|write_index)"):
            decoder.run(wrong, cache)
    with pytest.raises(EngineError, match="3 slots are needed"):
        decoder.new_cache(3, 64)
    with pytest.raises(ContextError, match="the engine has"):
        cache.reserve(10_000)
