"""What an engine is built for: a TensorRT flavor, and the GPU generation where one is named.

TensorRT-RTX compiles ahead of time for a compute capability, on any machine. TensorRT proper (`trt`) measures kernels,
so it builds for the GPU of the machine it runs on: JetPack's on a Jetson, the one from pip elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtral_runtime.backends.trt_package import Flavor
from pixtral_runtime.bundle.device_catalog import LEAST_CAPABILITY
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import EngineError, Option, SettingError

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)  # tensorrt_rtx.ComputeCapability


@dataclass(frozen=True)
class Target:
    """`capability` is CUDA's, 89 for 8.9; None is the GPU of this machine."""

    flavor: Flavor
    capability: int | None = None

    @property
    def name(self) -> str:
        """As users type it."""
        return self.flavor if self.capability is None else f"{self.flavor}:sm{self.capability}"

    @property
    def folder(self) -> str:
        """Where its engines lie in a bundle."""
        return f"engines/{self.name.replace(':', '-')}"


TARGETS = {
    target.name: target for target in (*(Target("rtx", capability) for capability in RTX_CAPABILITIES), Target("trt"))
}


def parse_targets(text: str) -> list[Target]:
    """Comma-separated names. Raises SettingError with the valid ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise SettingError(f"no target '{', '.join(unknown)}'", Option("target", tuple(TARGETS)))
    return [TARGETS[name] for name in dict.fromkeys(names)]


def refuse_types(bundle: Bundle, target: Target) -> None:
    """Raise EngineError where a bundle computes in types that the target lacks."""
    if bundle.dtype == "float32":
        raise EngineError(
            "TensorRT's attention takes no float32",
            f"pixtral export CHECKPOINT -o {bundle.path} --dtype float16 --force",
        )
    refuse_cached_codes(bundle)
    least = LEAST_CAPABILITY.get(bundle.precision, 0)
    if target.capability is not None and target.capability < least:
        able = [name for name, other in TARGETS.items() if (other.capability or 0) >= least]
        raise EngineError(
            f"{target.name} does not compute in {bundle.precision}",
            Option("target", tuple(able)),
            "pixtral export CHECKPOINT --precision int4",
        )


def refuse_cached_codes(bundle: Bundle) -> None:
    """Raise EngineError for a bundle with an int8 cache."""
    if bundle.kv_cache is not None:
        raise EngineError(
            "TensorRT has no int8 cache that is smaller or faster than a float16 one: each step would widen all of it",
            f"pixtral export CHECKPOINT -o {bundle.path} --force, without its option for the cache",
        )
