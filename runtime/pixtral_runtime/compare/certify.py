"""Making a bundle's certificate: what it computes here, stage by stage, by ONNX Runtime on the CPU.

The same bundle gives the same bytes with the same packages on the same processor, at any number of threads: figures of
ONNX Runtime do not depend on them, and those of other packages are rounded up to 1, 2 or 5 times a power of ten.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pixtral_runtime.bundle.certificate import (
    Certificate,
    Headroom,
    KnownAnswer,
    Sketch,
    recipe_of,
    settings_of,
    with_listed_engines,
)
from pixtral_runtime.bundle.manifest import Bundle, writing
from pixtral_runtime.compare.replay import Replay, Replayed, Tokens, likeliest
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import BundleError, MachineError
from pixtral_runtime.generation.model import Model, load_bundle
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

PACKAGES = ("mistral-common", "numpy", "onnxruntime", "opencv-python-headless", "pillow")
LOADED_SHARE = 1.5  # of a bundle's bytes that it takes in memory; seen 1.37 for int4 of the 12B's shapes
LOADED_MORE = 300_000_000  # bytes: packages, and what a step computes in


@dataclass(frozen=True)
class Reference:
    """What another implementation made of the same inputs: its largest error by stage, and the headroom of layers."""

    name: str
    errors: dict[str, float]
    headroom: dict[str, Headroom] = field(default_factory=dict)


Compare = Callable[[Model, Replay, Mapping[str, Tokens]], Reference | None]
"""Gets the greedy answers as well."""


def nothing(model: Model, replay: Replay, said: Mapping[str, Tokens]) -> None:
    """Compare with nobody."""


def certify(bundle: Bundle, compare: Compare = nothing, threads: int = 0) -> Certificate:
    """Write a bundle's certificate. Where this machine cannot run it the certificate says so and has no tensors.

    `compare` holds the loaded model beside another implementation. Raises BundleError where what is computed is no
    number, or the bundle's files are not what its manifest says.
    """
    replay = Replay(PromptBuilder(bundle, default_preprocess(bundle)))
    certificate = Certificate(
        fingerprint=bundle.fingerprint,
        settings=settings_of(bundle),
        recipe=recipe_of(bundle),
        tools=bundle.tools | _versions(),
        files={name: entry.sha256 for name, entry in bundle.files.items()},
        tokens=replay.texts(),
        tensors={"preprocess": {one.name: _finite(bundle, one) for one in replay.pixels()}},
    )
    try:
        _refuse_short_memory(bundle)
        model = load_bundle(bundle, replay.builder, threads=threads, backend="ort-cpu")
        certificate = _with_numbers(certificate, model, replay, compare)
    except MachineError as error:
        certificate = replace(certificate, omitted=str(error))
    certificate = with_listed_engines(certificate, bundle, {})
    certificate.write(bundle.path)
    return certificate


def certify_again(bundle: Bundle, threads: int = 0) -> Certificate:
    """As `certify`, for a bundle that is in use. Raises InputError where another process writes it."""
    with writing(bundle.path):
        return certify(bundle, threads=threads)


def _with_numbers(certificate: Certificate, model: Model, replay: Replay, compare: Compare) -> Certificate:
    said = replay.said(model)
    tensors: dict[str, dict[str, Sketch]] = dict(certificate.tensors)
    answers: dict[str, KnownAnswer] = {}
    for one in (*replay.features(model), *replay.embedded(model), *replay.decoded(model, said)):
        if isinstance(one, Replayed):
            tensors.setdefault(one.stage, {})[one.name] = _finite(model.bundle, one)
        elif one.name not in answers:
            tokens = said[one.name]
            answers[one.name] = KnownAnswer(replay.builder.detokenize(tokens), tokens, *likeliest(one.logits))
    certificate = replace(certificate, tensors=tensors, answers=answers)
    found = compare(model, replay, said)
    if found is None:
        return certificate
    errors = {stage: rounded_up(error) for stage, error in found.errors.items()}
    headroom = {graph: replace(one, largest=rounded_up(one.largest)) for graph, one in found.headroom.items()}
    return replace(certificate, agreement={found.name: errors}, headroom=headroom)


def rounded_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten: what varies in its last digits stays the same number."""
    if value <= 0 or not math.isfinite(value):
        return value
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{next(step for step in (1, 2, 5, 10) if value <= step * power) * power:.0e}")


def _finite(bundle: Bundle, one: Replayed) -> Sketch:
    if not math.isfinite(one.sketch.norm):
        raise BundleError(
            f"{bundle.path} computes values that are no numbers: {one.stage}, {one.name}",
            f"pixtral export CHECKPOINT -o {bundle.path} --force --dtype float32",
        )
    return one.sketch


def _refuse_short_memory(bundle: Bundle) -> None:
    available = available_memory_bytes()
    needed = int(LOADED_SHARE * sum(entry.bytes for entry in bundle.files.values())) + LOADED_MORE
    if available is not None and needed > available:
        raise MachineError(
            f"it takes {needed / 1e9:.1f} GB of memory to run, {available / 1e9:.1f} GB were available", "pixtral plan"
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
