"""The session runs with each TensorRT that there is, over a stand-in that has what that package has and no more.

What a package has was recorded from its own bindings by `scripts/record_trt_surface.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.networks import RTX
from helpers.places import DEMO, IMAGES
from helpers.trt_engines import PLAIN, engines, session
from helpers.trt_standin import StandIn
from helpers.trt_surface import RTX_1_7, SURFACES, TRT_10_3, TRT_11_4, Package
from pixtral_engines.profiles import Shapes
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.backends.session import Buffer
from pixtral_runtime.backends.trt_session import TrtSession, TrtSettings
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.inputs.prompt import Prompt


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


def answer(model: Model) -> tuple[int, ...]:
    """A few tokens of each of the three engines' work."""
    return model.generate("what is it?", [IMAGES / "red_triangle_64x64.png"], max_new_tokens=4).token_ids


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> tuple[int, ...]:
    return answer(load(bundle.path))


@pytest.mark.parametrize("package", list(SURFACES))
def test_engines_answer_with_every_package(
    package: str, bundle: Bundle, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trt = StandIn(HostDevice(), package)
    model = engines(trt, bundle, TrtSettings(cuda_graphs=True))
    assert answer(model) == expected and len(expected) == 4
    decoder = model.runner.sessions.decoder
    assert isinstance(decoder, TrtSession)
    assert decoder.graph_use.kind == ("built-in" if package == RTX_1_7 else "captured")
    assert bool(decoder.graph_use.replayed) == (package != RTX_1_7) and not decoder.graph_use.refused


# The surfaces must differ where the packages do, or these tests show nothing


def test_what_a_package_lacks_is_not_there(bundle: Bundle) -> None:
    old, new, rtx = (Package(name, {}) for name in (TRT_10_3, TRT_11_4, RTX_1_7))
    assert hasattr(new, "IStreamWriter") and hasattr(rtx, "IRuntimeCache")
    for package, name in ((old, "IStreamWriter"), (old, "IRuntimeConfig"), (new, "IRuntimeCache"), (new, "no_such")):
        with pytest.raises(AttributeError, match=name):
            getattr(package, name)
    with pytest.raises(AttributeError, match="FP4"):
        old.DataType.FP4  # noqa: B018
    assert new.DataType.FP4 == RTX.DataType.FP4
    trt = StandIn(HostDevice(), TRT_10_3)
    engine = session(trt, bundle, "embed")._engine
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    for value, name in (
        (engine, "get_aliased_input_tensor"),
        (engine, "create_runtime_config"),
        (context, "is_stream_capturable"),
        (context, "runs"),  # of the stand-in alone
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(value, name)


@pytest.mark.parametrize("package", [RTX_1_7, TRT_11_4])
def test_pieces_of_prompts_have_few_sizes_where_each_is_compiled(
    package: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = engines(StandIn(HostDevice(), package), bundle, PLAIN, Shapes(context=120, batch=1, chunk=64)).runner
    reference = load(bundle.path).runner
    embed, seen = runner.sessions.embed.run, set[tuple[int, int]]()

    def run(feeds: dict[str, Any]) -> dict[str, Buffer]:
        seen.add((feeds["token_ids"].shape[1], len(feeds["image_features"])))
        return embed(feeds)

    monkeypatch.setattr(runner.sessions.embed, "run", run)
    for count in (33, 70, 118):  # the last 54 of 118 are not filled up to 64: the cache has 120 rows
        random = np.random.default_rng(count)
        index = np.pad(np.arange(count - 3), (2, 1), constant_values=-1)
        prompt = Prompt(random.integers(3, 400, count), index, (), count - 3)
        features = random.standard_normal((count - 3, bundle.model.decoder.dim)).astype(bundle.dtype)
        answers = []
        for one in (runner, reference):
            cache = one.sessions.decoder.new_cache(1, 120)
            read = one.prefill(prompt, features, cache)
            answers.append(np.vstack([read, one.decode_token(7, count, cache)]))  # over what filled up the last piece
        assert relative_error(*answers) < 1e-2
    filled = {(64, 30), (64, 64), (32, 32), (54, 64)}  # a picture of 30 features has no more
    text = {(1, 1)}  # of a step
    assert seen == text | (filled if package == RTX_1_7 else {(33, 30), (64, 62), (6, 5), (54, 53)})
