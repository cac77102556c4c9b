"""TensorRT packages with only the names that `scripts/record_trt_surface.py` found in them.

What stands behind the names is made by a test or is TensorRT-RTX's, the one TensorRT that installs anywhere. A class,
method, property or member that the recorded package lacks raises AttributeError, as it does there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers.host_device import StandInError
from helpers.networks import RTX
from pixtral_runtime.json_data import from_json

RECORDED = Path(__file__).parents[1] / "data/trt_surfaces"
DERIVED = ("ILogger", "IProgressMonitor", "IStreamWriter")  # classes that users derive their own from
NATIVE = ("Dims", "IHostMemory", "Permutation", "Weights")  # Python itself reads them


@dataclass(frozen=True)
class Surface:
    """A package's public names."""

    package: str
    version: str
    recorded: str  # how
    functions: list[str]
    enums: dict[str, list[str]]
    classes: dict[str, list[str]]

    @property
    def name(self) -> str:
        return f"{self.package}-{self.version}"


def _surfaces() -> dict[str, Surface]:
    files = sorted(RECORDED.glob("*.json"))
    found = [from_json(Surface, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return {surface.name: surface for surface in found}


SURFACES = _surfaces()
RTX_1_7 = "tensorrt_rtx-1.7.1.116"
TRT_10_3, TRT_10_15, TRT_10_16, TRT_11_4 = (
    f"tensorrt-{version}" for version in ("10.3.0", "10.15.1.29", "10.16.1.11", "11.4.0.106")
)


class Package(ModuleType):
    """A recorded package. `made` has what stands behind a name, in the place of TensorRT-RTX's."""

    def __init__(self, name: str, made: Mapping[str, Any]) -> None:
        self._surface, self._made = SURFACES[name], made
        super().__init__(self._surface.package)
        self.__version__ = self._surface.version

    def __getattr__(self, name: str) -> Any:
        surface = self._surface
        if name not in (*surface.functions, *surface.enums, *surface.classes):
            raise AttributeError(f"module '{surface.package}' has no attribute '{name}'")
        value = self._made[name] if name in self._made else _known(RTX, name)
        if name in surface.enums:
            return Face(value, surface.enums[name], name, self.face)
        return value if name in DERIVED else self.face(value)

    def face(self, value: Any) -> Any:
        """A value as the package gives it: objects show what it has, functions give and take such objects."""
        kind = type(value).__name__
        if kind in self._surface.classes and kind not in NATIVE:
            return Face(value, self._surface.classes[kind], kind, self.face)
        if callable(value) and not isinstance(value, Face) and kind not in self._surface.enums:
            return self._function(value)
        return value

    def _function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return self.face(function(*map(bare, arguments), **{name: bare(value) for name, value in named.items()}))

        return call if isinstance(function, type) else wraps(function)(call)


class Face:
    """A TensorRT object, or the members of an enumeration, with the names that a package has."""

    def __init__(self, value: Any, names: list[str], kind: str, face: Callable[[Any], Any]) -> None:
        vars(self).update(_value=value, _names=names, _kind=kind, _face=face)

    def __getattr__(self, name: str) -> Any:
        self._refuse_unknown(name)
        return self._face(_known(self._value, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_unknown(name)
        setattr(self._value, name, bare(value))

    def _refuse_unknown(self, name: str) -> None:
        if name not in self._names:
            raise AttributeError(f"'{self._kind}' has no attribute '{name}'")


def _known(holder: Any, name: str) -> Any:
    """What the package has and tests do not must not look as if the package had it not."""
    if not hasattr(holder, name):
        raise StandInError(f"nothing stands in for {name} of {holder}")
    return getattr(holder, name)


def bare(value: Any) -> Any:
    """What stands behind a face."""
    return value._value if isinstance(value, Face) else value
