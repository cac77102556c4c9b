"""The session runs with each TensorRT that there is, over a stand-in that has what that package has and no more.

What a package has was recorded from its own bindings by `scripts/record_trt_surface.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.networks import RTX
from helpers.places import DEMO, IMAGES
from helpers.trt_engines import engines, session
from helpers.trt_standin import StandIn
from helpers.trt_surface import RTX_1_7, SURFACES, TRT_10_3, TRT_11_4, Package
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.backends.trt_session import TrtSession, TrtSettings
from pixtral_runtime.bundle.manifest import Bundle


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
