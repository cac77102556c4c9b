"""From a bundle's graphs to TensorRT engines, on a machine with or without a GPU.

Networks are strongly typed: the graph says what each layer computes in. What TensorRT drops, widens to float32 or
cannot read stops the build with the node's name. Engines go to disk as TensorRT makes them, under names of their own,
and the bundle's manifest lists them with what they were built from: all of a target at once, so that a build that is
stopped leaves the engines that were there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from pixtral_engines.build_plan import BuildPlan
from pixtral_engines.lowering_trt10_3 import COMPAT
from pixtral_engines.network import ParsedNetwork, parse_graph
from pixtral_engines.parts import specs_of
from pixtral_engines.profiles import Profile, ranges
from pixtral_engines.targets import Target
from pixtral_runtime.backends.cuda import gpu_here
from pixtral_runtime.backends.trt_package import import_tensorrt, log_of, version_of
from pixtral_runtime.bundle.engine_list import (
    Engine,
    EngineSet,
    open_engines,
    source_of,
    with_engines,
)
from pixtral_runtime.bundle.integrity import unchanged
from pixtral_runtime.bundle.manifest import Bundle, open_bundle, writing
from pixtral_runtime.bundle.spec import GRAPHS, GraphSpec
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import EngineError, InputError, MachineError, MemoryShortageError, Option, SettingError
from pixtral_runtime.files import Output, check_outputs, sync, write_atomically

ENGINE, PARTIAL = ".engine", ".partial"
MADE_HERE = re.compile(
    rf"({'|'.join(GRAPHS)})(\.\d{{1,3}})?({PARTIAL}|(\.[0-9a-f]{{8}})?{ENGINE})"
)  # earlier versions: no digits
DECODER = "decoder"  # the graph that has cache rows
UNUSED_INPUT = "Unused Input"

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, steps done and steps in all."""


@dataclass(frozen=True)
class BuildSettings:
    """`timing_cache` keeps kernels' times for the next build; None: beside the engines. TensorRT-RTX has none.

    `workspace_bytes` is what a layer may take to compute in. None: TensorRT's default, the whole memory of the GPU; for
    the GPU of this machine no more than the system has available, which on a Jetson is the same memory. Raises
    InputError for a form of the graphs that is not known.
    """

    optimization_level: int | None = None  # 0 to 5; None: TensorRT's default
    timing_cache: Path | None = None
    compat: str | None = None  # COMPAT: graphs in the form for TensorRT 10.3
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.compat not in (None, COMPAT):
            raise SettingError(f"no form of the graphs for '{self.compat}'", Option("compat", COMPAT))


def build(
    bundle: Bundle, plan: BuildPlan, settings: BuildSettings, progress: Progress, fewer_rows: Sequence[BuildPlan] = ()
) -> Bundle:
    """Build a target's engines and list them in the manifest, in the place of those that were there.

    `fewer_rows` are plans of further decoders, for the same target and fewer cache rows. Raises MachineError where
    memory or disk will not do, InputError where TensorRT refuses a graph.
    """
    package = import_tensorrt(plan.target.flavor)
    for one in (plan, *fewer_rows):
        _refuse_small_machine(bundle, one, package)
    version = version_of(package)
    gpu = None if plan.target.flavor == "rtx" else gpu_here()
    built: list[EngineSet] = []
    try:
        for one in (plan, *fewer_rows):
            engines = {} if not built else {name: built[0].graphs[name] for name in GRAPHS if name != DECODER}
            for graph in [DECODER] if built else GRAPHS:
                for name, spec in specs_of(bundle, graph, one.cuts, compat=settings.compat is not None).items():
                    engines[name] = _build_engine(bundle, graph, spec, one, settings, package, progress)
            built.append(
                EngineSet(
                    target=one.listed_as,
                    tensorrt=version,
                    precision=bundle.precision,
                    context=one.shapes.context,
                    batch=one.shapes.batch,
                    chunk=one.shapes.chunk,
                    graphs=engines,
                    compat=settings.compat,
                    gpu=gpu.name if gpu else None,
                    capability=gpu.capability if gpu else None,
                    cuts=list(one.cuts),
                )
            )
        sync(bundle.path / plan.target.folder)
        bundle = with_engines(bundle, *built)
        bundle.write()
    finally:
        _remove_unlisted(bundle, plan.target)
    open_engines(bundle, plan.target.name, version)
    return bundle


def _remove_unlisted(bundle: Bundle, target: Target) -> None:
    """Engines that were replaced, and those of a build that was stopped; whatever else lies there stays."""
    own = set(bundle.own_files)
    for path in (bundle.path / target.folder).glob("*"):
        if MADE_HERE.fullmatch(path.name) and path not in own:
            path.unlink(missing_ok=True)


def build_targets(bundle: Bundle, plans: Sequence[BuildPlan], settings: BuildSettings, progress: Progress) -> Bundle:
    """Build for each target in turn, while nobody else writes the bundle. A target's plans follow each other.

    Raises what `build` raises, and InputError before it starts where something could not be written.
    """
    if settings.timing_cache is not None:
        check_outputs([Output(settings.timing_cache, Option("timing_cache", "FILE"), replaces=True)], bundle.own_files)
    with writing(bundle.path):
        now = open_bundle(bundle.path)  # another build may have listed its engines
        if now.fingerprint != bundle.fingerprint:
            raise EngineError(f"{bundle.path} was exported anew meanwhile", "build again")
        bundle = replace(bundle, engines=now.engines)
        with unchanged(bundle):
            for _, of_target in groupby(plans, key=lambda plan: plan.target.name):
                most_rows, *fewer = of_target
                bundle = build(bundle, most_rows, settings, progress, fewer)
    return bundle


def _refuse_small_machine(bundle: Bundle, plan: BuildPlan, package: ModuleType) -> None:
    needed, free = sum(plan.engine_bytes.values()), shutil.disk_usage(bundle.path).free
    if free < needed:
        raise MachineError(
            f"engines for {plan.target.name} take {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", "df -h"
        )
    peak = plan.peak_memory_bytes + (0 if _streams(package) else max(plan.engine_bytes.values()))
    available = available_memory_bytes()
    if available is not None and available < peak:
        raise MemoryShortageError(
            f"building for {plan.target.name} takes some {peak / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available",
            Option("parts", "MORE"),
            "build on a larger machine, which needs no GPU for rtx targets, and copy the bundle",
            "pixtral export … --precision int4",
        )


def _build_engine(
    bundle: Bundle,
    graph: str,
    spec: GraphSpec,
    plan: BuildPlan,
    settings: BuildSettings,
    package: ModuleType,
    progress: Progress,
) -> Engine:
    """One engine of a graph, the one of these tensors."""
    log, name = log_of(package), spec.name
    parsed = parse_graph(
        bundle, graph, package, plan.shapes.context, compat=settings.compat is not None, part=spec, cuts=plan.cuts
    )
    if parsed.widened:
        raise EngineError(
            f"{name}: TensorRT computes {', '.join(parsed.widened[:3])} in float32, which the graph does not ask for",
            "pixtral doctor, and report the versions it names",
        )
    config = _configure(spec, plan.profiles[graph], plan.target, settings, parsed)
    timing_cache = settings.timing_cache or bundle.path / plan.target.folder / "timing.cache"
    if plan.target.flavor == "trt":
        _load_timing_cache(config, timing_cache)
    monitor = config.progress_monitor = _monitor(package, f"{plan.target.name} {name}", progress)
    partial = bundle.path / plan.target.folder / f"{name}{PARTIAL}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)  # of a build that was killed
    warned, failed = len(log.warnings), len(log.errors)
    try:
        with partial.open("xb") as stream:
            writer = _writer(package, stream)
            built = _serialize(parsed, config, writer)
            stream.flush()
            os.fsync(stream.fileno())
        if monitor.interrupted:
            raise KeyboardInterrupt(f"{plan.target.name} {name}")
        if writer.error is not None:
            raise writer.error
        if not built:
            first = next(iter(log.errors[failed:]), "no reason given")
            raise EngineError(
                f"TensorRT cannot build {name} for {plan.target.name}: {first}",
                Option("target", "ANOTHER"),
                Option("context", "SMALLER"),
                Option("batch", "SMALLER"),
                Option("chunk", "SMALLER"),
            )
        if dropped := [text for text in log.warnings[warned:] if UNUSED_INPUT in text]:
            raise EngineError(f"TensorRT drops an input of {name}: {dropped[0]}", "pip install --upgrade pixtral")
        path = partial.with_name(f"{name}.{writer.digest.hexdigest()[:8]}{ENGINE}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if plan.target.flavor == "trt":
        write_atomically(timing_cache, bytes(config.get_timing_cache().serialize()))
    listed = [{letter: list(sizes) for letter, sizes in profile.items()} for profile in plan.profiles[graph]]
    file = f"{plan.target.folder}/{path.name}"
    return Engine(file, path.stat().st_size, writer.digest.hexdigest(), source_of(bundle, graph), listed)


def _streams(package: ModuleType) -> bool:
    """Whether an engine can go to disk as it is made: TensorRT 10.3 cannot."""
    return hasattr(package, "IStreamWriter")


def _serialize(parsed: ParsedNetwork, config: Any, writer: Any) -> bool:
    """Build an engine and write it. Returns whether TensorRT could."""
    if _streams(parsed.trt):
        return bool(parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer))
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    return engine is not None and writer.write(memoryview(engine)) > 0


def _configure(
    spec: GraphSpec, profiles: Sequence[Profile], target: Target, settings: BuildSettings, parsed: ParsedNetwork
) -> Any:
    package = parsed.trt
    config = parsed.builder.create_builder_config()
    _limit_memory(config, package, target, settings.workspace_bytes)
    if target.capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(package.ComputeCapability, f"SM{target.capability}"), 0)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    for sizes in profiles:
        profile = parsed.builder.create_optimization_profile()
        for tensor in spec.inputs:
            profile.set_shape(tensor.name, *ranges(tensor, sizes))
        config.add_optimization_profile(profile)
    return config


def _limit_memory(config: Any, package: ModuleType, target: Target, workspace_bytes: int | None) -> None:
    """What kernels may take, tried here or used later; a limit that TensorRT has by itself is only lowered."""
    pools = package.MemoryPoolType
    if workspace_bytes is not None:
        config.set_memory_pool_limit(pools.WORKSPACE, workspace_bytes)
    available = available_memory_bytes()
    if target.flavor == "rtx" or available is None:  # TensorRT-RTX tries no kernels, and the GPU is not this machine's
        return
    power_of_two = 1 << available.bit_length() >> 1  # TensorRT takes nothing else for the second
    for pool, limit in ((pools.WORKSPACE, available), (pools.TACTIC_DRAM, power_of_two)):
        if config.get_memory_pool_limit(pool) > limit:
            config.set_memory_pool_limit(pool, limit)


def _load_timing_cache(config: Any, path: Path) -> None:
    try:
        kept = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", Option("timing_cache", "FILE")) from error
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(f"TensorRT cannot use the timing cache {path}", f"rm {path}")


def _writer(package: ModuleType, stream: Any) -> Any:
    """An IStreamWriter into a file, with the sha256 of what went through and the error that stopped it."""
    base = package.IStreamWriter if _streams(package) else object

    class Writer(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.digest = hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                stream.write(data)
            except OSError as error:  # must not travel through TensorRT
                self.error = error
                return 0
            self.digest.update(data)
            return len(data)

    return Writer()


def _monitor(package: ModuleType, stage: str, progress: Progress) -> Any:
    """An IProgressMonitor that reports the outermost phase, and stops the build at Ctrl-C."""

    class Monitor(package.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps
                self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._report(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._report(phase_name, self.steps.pop(phase_name))

        def _report(self, phase: str, step: int) -> None:
            try:
                progress(f"{stage}: {phase}", step, self.steps.get(phase, step))
            except KeyboardInterrupt:  # must not travel through TensorRT
                self.interrupted = True

    return Monitor()
