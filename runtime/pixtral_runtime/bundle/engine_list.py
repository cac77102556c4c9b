"""The engines that a bundle lists: what they were built for and from, and whether they may still be used.

A target may have decoders for several numbers of cache rows, since attention reads all rows that an engine has. Those
of fewer rows are sets of their own, `rtx:sm89@1280` beside `rtx:sm89`, which share the other engines' files.

An engine answers for the graph and the weights it was compiled from. One that was built from others, or is not the
file that was written, is refused with the reason, never used silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.decoder_parts import are_cuts, engine_specs
from pixtral_runtime.bundle.integrity import check_file, unchanged_files
from pixtral_runtime.bundle.manifest import WEIGHTS, Bundle, FileEntry
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import EngineError, OtherGpuError, StaleEngineError
from pixtral_runtime.json_data import from_json


@dataclass(frozen=True)
class Engine:
    """A serialized engine. `file` is relative to the bundle; `profiles` map dimension letters to size ranges."""

    file: str
    bytes: int
    sha256: str
    source_sha256: str  # of graph and weights, see `source_of`
    profiles: list[dict[str, list[int]]]


@dataclass(frozen=True)
class EngineSet:
    """A target's engines, by graph.

    `tensorrt` is package and version, `compat` an older version in whose form the graphs were, None for their own.
    `gpu` and `capability` are the GPU that they were built on; None for a target that names a capability, and for
    engines of earlier versions. `cuts` are those of a decoder in parts (`decoder_parts`), which `graphs` has by the
    parts' names.
    """

    target: str
    tensorrt: str
    precision: str
    context: int
    batch: int
    chunk: int
    graphs: dict[str, Engine]
    compat: str | None = None
    gpu: str | None = None
    capability: int | None = None
    cuts: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineSet:
        """Inverse of `to_dict`. Raises TypeError on unknown or missing fields, and those of another type."""
        return from_json(cls, data)


ROWS_MARK = "@"


def name_of_fewer_rows(target: str, rows: int) -> str:
    """How a target's engines of fewer cache rows are listed beside those of most."""
    return f"{target}{ROWS_MARK}{rows}"


def names_of_target(bundle: Bundle, target: str) -> list[str]:
    """How a target's engines are listed: those of most cache rows first."""
    return sorted(name for name in bundle.engines if _target_of(name) == target)


def _target_of(name: str) -> str:
    return name.partition(ROWS_MARK)[0]


def source_of(bundle: Bundle, graph: str) -> str:
    """What an engine is compiled from: the sha256 of the graph's file and of the weight file."""
    return f"{bundle.files[f'{graph}.onnx'].sha256}+{bundle.files[WEIGHTS].sha256}"


def with_engines(bundle: Bundle, engines: EngineSet, *others: EngineSet) -> Bundle:
    """The bundle with a target's engines listed in the place of earlier ones; `others` have fewer rows."""
    kept = {name: built for name, built in bundle.engines.items() if _target_of(name) != engines.target}
    return replace(bundle, engines=kept | {built.target: built.to_dict() for built in (engines, *others)})


def listed_engines(bundle: Bundle, target: str) -> EngineSet:
    """A target's engines as the manifest lists them. Raises EngineError where the list cannot be read."""
    try:
        engines = EngineSet.from_dict(bundle.engines[target])
        if not are_cuts(bundle.graph_spec("decoder"), engines.cuts):
            raise TypeError(f"a decoder cannot be cut at {engines.cuts}")
        return engines
    except (TypeError, RecursionError) as error:
        raise EngineError(
            f"{bundle.path}: the list of engines for {target} cannot be read: {error}",
            _rebuild(bundle, target),
        ) from error


def open_engines(bundle: Bundle, target: str, tensorrt: str, rows: int | None = None) -> EngineSet:
    """A target's engines, each checked against the bundle. `tensorrt` is the package and version that will run them.

    Of several, those that have the fewest cache rows of at least `rows`, otherwise those of most. Raises OtherGpuError
    where there are engines for other targets only, StaleEngineError where one was built from something else or by
    another TensorRT, and EngineError where one is absent or was changed; all with the command that builds them.
    """
    rebuild = _rebuild(bundle, target)
    if target not in bundle.engines:
        listed = ", ".join(sorted(set(map(_target_of, bundle.engines)))) or "none"
        error = OtherGpuError if bundle.engines else EngineError
        raise error(f"{bundle.path} has no engines for {target}; there are: {listed}", rebuild)
    sets = [listed_engines(bundle, name) for name in names_of_target(bundle, target)]
    engines = min((one for one in sets if rows and one.context >= rows), key=lambda one: one.context, default=sets[0])
    if engines.tensorrt != tensorrt:
        raise StaleEngineError(
            f"the engines for {target} were built by {engines.tensorrt}, here is {tensorrt}: plans do not travel",
            rebuild,
        )
    for graph in GRAPHS:
        source = source_of(bundle, graph)
        for name in engine_specs(bundle.graph_spec(graph), engines.cuts):
            if name not in engines.graphs:
                raise EngineError(f"{bundle.path} has no {name} engine for {target}", rebuild)
            engine = engines.graphs[name]
            file = bundle.path / engine.file
            if engine.source_sha256 != source:
                raise StaleEngineError(f"{file}: it was built from another {graph} graph or other weights", rebuild)
            if damage := _damage(file, engine):
                raise EngineError(f"{file}: {damage}", rebuild)
    return engines


def built_elsewhere(bundle: Bundle, engines: EngineSet, gpu: str, capability: int) -> str:
    """What there is to say of engines that were built on another GPU than this one; empty where they were not.

    Raises OtherGpuError where it is of another generation: TensorRT would refuse them.
    """
    rebuild = _rebuild(bundle, engines.target)
    if engines.capability not in (None, capability):
        raise OtherGpuError(
            f"the engines for {engines.target} were built on {_gpu(engines.gpu, engines.capability)}, "
            f"here is {_gpu(gpu, capability)}",
            rebuild,
        )
    if engines.gpu in (None, gpu):
        return ""
    return f"built on {engines.gpu}, here is {gpu}: {rebuild} picks kernels for this one"


def _gpu(name: str | None, capability: int | None) -> str:
    return f"{name} (compute capability {(capability or 0) / 10:.1f})"


@contextmanager
def unchanged_engines(bundle: Bundle, engines: EngineSet) -> Iterator[None]:
    """Open engines within: their files are found right before, and the same after. Raises EngineError."""
    with unchanged_files(bundle.path, _entries(engines), _rebuild(bundle, engines.target), EngineError):
        yield


def verify_engines(bundle: Bundle, engines: EngineSet) -> None:
    """Read every engine and compare its hash. Raises EngineError where one was changed."""
    for name, entry in _entries(engines).items():
        check_file(bundle.path / name, entry, _rebuild(bundle, engines.target), EngineError, trusting=False)


def _entries(engines: EngineSet) -> dict[str, FileEntry]:
    return {engine.file: FileEntry(engine.bytes, engine.sha256) for engine in engines.graphs.values()}


def _rebuild(bundle: Bundle, target: str) -> str:
    return f"pixtral build {bundle.path} --target {_target_of(target)}"


def _damage(path: Path, engine: Engine) -> str:
    """What is wrong with an engine's file; empty where nothing is."""
    if not os.path.isfile(path):
        return "it is missing"
    if path.stat().st_size != engine.bytes:
        return f"{path.stat().st_size} bytes, expected {engine.bytes}: the file was changed"
    return ""
