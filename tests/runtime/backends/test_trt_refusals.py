"""What a TensorRT session refuses: rows, feeds, caches and files that are not the engine's, each with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO
from helpers.trt_engines import (
    SHAPES,
    engine_file,
    hidden_of,
    session,
    step_feeds,
)
from helpers.trt_standin import StandIn
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.ort_session import OrtSession, OrtSettings
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_session import TrtSession
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import InputError, MachineError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In bfloat16."""
    return exported(DEMO, tmp_path_factory.mktemp("bfloat16") / "b", ExportSettings(dtype="bfloat16"))


def test_more_rows_than_the_engine_has_are_refused(bundle: Bundle) -> None:
    decoder = session(StandIn(HostDevice()), bundle, "decoder")
    cache = decoder.new_cache(1, 1)
    assert (cache.slots, cache.rows) == (1, SHAPES.context)
    cache.reserve(SHAPES.context)
    for ask in (lambda: cache.reserve(257), lambda: decoder.new_cache(1, 257)):
        with pytest.raises(InputError, match="257 cache rows are needed, the engine has 256") as raised:
            ask()
        assert raised.value.hint.endswith("--context 257")
    with pytest.raises(InputError, match="3 slots are needed, the engine has 2") as raised:
        decoder.new_cache(3, 1)
    assert raised.value.hint.endswith("--batch 3")


def test_feeds_outside_every_profile_are_refused_with_the_limits(bundle: Bundle) -> None:
    trt = StandIn(HostDevice())
    decoder, vision = session(trt, bundle, "decoder"), session(trt, bundle, "vision")
    dim, side = bundle.model.decoder.dim, bundle.limits.max_image_side
    cache = decoder.new_cache(1, 1)
    limits = (
        rf"hidden is \(1, 17, {dim}\), the engine takes \(1, 1, {dim}\) to \(2, 16, {dim}\), or .* to \(2, 1, {dim}\)"
    )
    with pytest.raises(InputError, match=limits) as raised:
        decoder.run(step_feeds(bundle, hidden_of(bundle, 1, 17), np.arange(17)[None]), cache)
    assert "--chunk" in raised.value.hint
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 3), np.arange(3)[None])
    with pytest.raises(InputError, match="logits_index is"):
        decoder.run({**feeds, "logits_index": np.arange(3)}, cache)
    with pytest.raises(InputError, match=f"pixels is .*, the engine takes .* to .*{side}, {side}"):
        vision.run({"pixels": np.zeros((1, 3, side, side * 2), bundle.dtype)})
    # and what fits still runs
    decoder.run(step_feeds(bundle, hidden_of(bundle, 1, 16), np.arange(16)[None]), cache)["logits"].numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feeds: feeds | {"hidden": feeds["hidden"].astype(np.float32)}, "hidden is float32, expected float16"),
        (lambda feeds: feeds | {"hiden": feeds["hidden"]}, "missing or unknown: hiden"),
        (lambda feeds: {"hidden": feeds["hidden"]}, "missing or unknown: inverse_temperature, logits_index, .*"),
    ],
)
def test_wrong_feeds_are_refused(
    bundle: Bundle, change: Callable[[dict[str, Array]], dict[str, Array]], message: str
) -> None:
    decoder = session(StandIn(HostDevice()), bundle, "decoder")
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 3), np.arange(3)[None])
    with pytest.raises(InputError, match=message):
        decoder.run(change(feeds), decoder.new_cache(1, 3))
    with pytest.raises(InputError, match="past_key_0"):
        decoder.run(feeds)


def test_a_cache_that_is_not_the_engines_is_refused(bundle: Bundle, wide: Bundle) -> None:
    """By its memory's addresses a cache of another type would be read as if it were of this one."""
    device = HostDevice()
    decoder, embed = session(StandIn(device), bundle, "decoder"), session(StandIn(device), bundle, "embed")
    theirs = OrtSession(bundle, "decoder", OrtSettings())
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.zeros((1, 1), np.int64))
    own, other = decoder.new_cache(1, 1), session(StandIn(device), wide, "decoder").new_cache(1, 1)
    for cache, message in (
        (None, "decoder needs a cache, past_key_0 .* to past_value_.*: none was handed over"),
        (theirs.new_cache(1, 1), "decoder runs here on a cache of the kind DeviceCache, seen OrtCache"),
        (other, "decoder's cache is past_key_0 .*float16.*, seen past_key_0 .*bfloat16"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            decoder.run(feeds, cache)
        assert "new_cache" in raised.value.hint
    with pytest.raises(InputError, match="decoder runs here on a cache of the kind OrtCache, seen DeviceCache"):
        theirs.run(feeds, own)
    tokens = {
        "token_ids": np.array([[5]]),
        "image_features": hidden_of(bundle, 1, 1)[0],
        "feature_index": np.array([[-1]]),
    }
    with pytest.raises(InputError, match="embed has no cache, seen DeviceCache"):
        embed.run(tokens, own)
    assert device.events == []
    decoder.run({**feeds, "hidden": embed.run(tokens)["hidden"]}, own.view(0, 1))["logits"].numpy()
    assert device.events[:2] == ["embed", "decoder"]


def test_a_file_that_is_not_the_engine_is_refused(bundle: Bundle, wide: Bundle, tmp_path: Path) -> None:
    trt, other = StandIn(HostDevice()), tmp_path / "other.engine"
    other.write_bytes(b"something else")
    for path, error, message in (
        (other, MachineError, "the magic tag does not match"),
        (tmp_path / "none.engine", InputError, "cannot be read"),
        (engine_file(bundle, "embed"), InputError, "not this bundle's decoder engine.*feature_index"),
        (engine_file(wide, "decoder"), InputError, "not this bundle's decoder engine.*past_key_0.*bfloat16"),
    ):
        with pytest.raises(error, match=message) as raised:
            TrtSession(trt, path, bundle, "decoder", trt.device)
        assert raised.value.hint.startswith(f"pixtral build {bundle.path}")
