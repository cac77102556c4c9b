"""`--target trt` builds with what each recorded TensorRT has. Behind the names is TensorRT-RTX, for SM89."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.networks import RTX
from helpers.trt_surface import RTX_1_7, SURFACES, TRT_10_3, TRT_11_4, Package
from pixtral_cli.main import app
from pixtral_engines import build as building
from pixtral_engines.build import BuildSettings, build
from pixtral_engines.build_plan import plan_build
from pixtral_engines.lowering_trt10_3 import COMPAT
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_runtime.backends.cuda import GpuModel
from pixtral_runtime.backends.trt_package import log_of
from pixtral_runtime.bundle.engine_list import Engine, EngineSet, built_elsewhere, listed_engines
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.errors import MachineError, MemoryShortageError, OtherGpuError
from pixtral_runtime.files import sha256_of_file

L4 = GpuModel("NVIDIA L4", 89)
SHAPES = Shapes(context=256, batch=1, chunk=16)
DEFAULT_BYTES, FREE_BYTES = 68_719_476_736, 30_000_000_000


class Builder(RTX.Builder):  # type: ignore[misc,name-defined]
    """TensorRT builds for the GPU that is here; this one for SM89, on any machine."""

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(RTX.ComputeCapability.SM89, 0)
        return config


def use(monkeypatch: pytest.MonkeyPatch, package: str, gpu: GpuModel | None = L4) -> ModuleType:
    """A machine with this package and such a GPU."""
    trt = Package(package, {"Builder": Builder})
    monkeypatch.setattr(building, "import_tensorrt", lambda flavor: trt)
    monkeypatch.setattr(building, "gpu_here", lambda: gpu)
    return trt


@pytest.mark.filterwarnings("ignore:Use :DeprecationWarning")  # TensorRT-RTX keeps no times of kernels
@pytest.mark.parametrize("package", [name for name in SURFACES if name != RTX_1_7])
def test_every_package_builds(package: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 10.3 cannot stream: the engine is made in memory."""
    trt = use(monkeypatch, package)
    settings = BuildSettings(optimization_level=0, compat=COMPAT if package == TRT_10_3 else None)
    plan = plan_build(copy, TARGETS["trt"], SHAPES)
    engine = building._build_engine(copy, "embed", copy.graph_spec("embed"), plan, settings, trt, lambda *_: None)
    assert engine.sha256 == sha256_of_file(copy.path / engine.file) and engine.bytes > 100_000
    assert (copy.path / "engines/trt/timing.cache").is_file()


@pytest.mark.parametrize(("gpu", "expected"), [(L4, ("NVIDIA L4", 89)), (None, (None, None))])
def test_engines_say_on_which_gpu_they_were_built(
    gpu: GpuModel | None, expected: tuple[str | None, int | None], copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, TRT_11_4, gpu)
    monkeypatch.setattr(building, "_build_engine", lambda bundle, graph, *_: Engine(f"{graph}.engine", 0, "", "", []))
    monkeypatch.setattr(building, "open_engines", lambda *_: None)
    (copy.path / TARGETS["trt"].folder).mkdir(parents=True)
    build(copy, plan_build(copy, TARGETS["trt"], SHAPES), BuildSettings(), lambda *_: None)
    engines = listed_engines(open_bundle(copy.path), "trt")
    assert (engines.tensorrt, engines.gpu, engines.capability) == ("tensorrt 11.4.0.106", *expected)


def test_engines_of_another_gpu_are_refused_or_said_to_be(plain: Bundle) -> None:
    engines = EngineSet("trt", "tensorrt 11", "float16", 256, 1, 16, {}, gpu=L4.name, capability=L4.capability)
    assert built_elsewhere(plain, engines, "NVIDIA L4", 89) == ""
    assert "built on NVIDIA L4, here is NVIDIA L40S" in built_elsewhere(plain, engines, "NVIDIA L40S", 89)
    with pytest.raises(OtherGpuError, match=r"on NVIDIA L4 \(.* 8\.9\), here is NVIDIA A10 \(.* 8\.6\)") as caught:
        built_elsewhere(plain, engines, "NVIDIA A10", 86)
    assert caught.value.hint == f"pixtral build {plain.path} --target trt"
    earlier = EngineSet("trt", "tensorrt 11", "float16", 256, 1, 16, {})
    assert built_elsewhere(plain, earlier, "NVIDIA A10", 86) == ""


@pytest.mark.parametrize(
    ("target", "wanted", "available", "expected"),
    [
        ("trt", None, FREE_BYTES, FREE_BYTES),
        ("trt", None, DEFAULT_BYTES * 2, DEFAULT_BYTES),
        ("trt", None, None, DEFAULT_BYTES),
        ("trt", 2_000_000_000, FREE_BYTES, 2_000_000_000),
        ("rtx:sm89", None, FREE_BYTES, DEFAULT_BYTES),
        ("rtx:sm89", 2_000_000_000, FREE_BYTES, 2_000_000_000),
    ],
)
def test_kernels_get_no_more_memory_than_there_is(
    target: str, wanted: int | None, available: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TensorRT tries kernels. Without a GPU TensorRT-RTX's own limit is 64 GiB."""
    monkeypatch.setattr(building, "available_memory_bytes", lambda: available)
    config = RTX.Builder(log_of(RTX).logger).create_builder_config()
    building._limit_memory(config, RTX, TARGETS[target], wanted)
    assert config.get_memory_pool_limit(RTX.MemoryPoolType.WORKSPACE) == expected
    tactics = config.get_memory_pool_limit(RTX.MemoryPoolType.TACTIC_DRAM)
    assert tactics == (1 << 34 if (target, available) == ("trt", FREE_BYTES) else DEFAULT_BYTES)


def test_an_engine_that_is_made_in_memory_needs_more_of_it(plain: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_build(plain, TARGETS["trt"], SHAPES)
    monkeypatch.setattr(building, "available_memory_bytes", lambda: plan.peak_memory_bytes)
    building._refuse_small_machine(plain, plan, use(monkeypatch, TRT_11_4))
    with pytest.raises(MemoryShortageError, match="building for trt takes"):
        building._refuse_small_machine(plain, plan, use(monkeypatch, TRT_10_3))


def test_the_command_passes_the_limit_on(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(bundle: Bundle, plans: object, settings: BuildSettings, progress: object) -> None:
        raise MachineError(f"a workspace of {settings.workspace_bytes} bytes")

    monkeypatch.setattr(building, "build_targets", stop)
    asked = ["build", str(copy.path), "--target", "rtx:sm89", "--workspace"]
    done = CliRunner().invoke(app, [*asked, "2GB"])
    assert done.exit_code == 4 and "a workspace of 2000000000 bytes" in done.stderr
    wrong = CliRunner().invoke(app, [*asked, "much"])
    assert wrong.exit_code == 3 and "--workspace 8GB" in wrong.stderr
