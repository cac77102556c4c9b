"""The certificate: what a bundle computed where it was made, small, in `certificate.json` beside `bundle.json`.

It is bound to one bundle, by the fingerprint of its files and a hash of its settings, and sealed like the manifest. It
is no file of the manifest: with it or without it a bundle gives the same answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.engine_list import EngineSet, listed_engines
from pixtral_runtime.bundle.manifest import CERTIFICATE, Bundle
from pixtral_runtime.errors import BundleError, Option
from pixtral_runtime.files import write_atomically
from pixtral_runtime.json_data import SEAL, from_json, sealed, unsealed

CERTIFICATE_SCHEMA = 1
NOT_SETTINGS = ("path", "files", "tools", "engines", "schema")
"""What of a manifest decides no answer, or has its own place in a certificate."""


@dataclass(frozen=True)
class Sketch:
    """A tensor in a few numbers (`pixtral_runtime.compare.sketch`). `norm` is sqrt(sum x²), `largest` max |x|."""

    shape: tuple[int, ...]
    norm: float
    largest: float
    sums: tuple[float, ...]


@dataclass(frozen=True)
class KnownAnswer:
    """A greedy answer, and the likeliest tokens of each position with their logits, the first first."""

    text: str
    token_ids: tuple[int, ...]  # (n,), the one that ends it included
    top_ids: tuple[tuple[int, ...], ...]  # (n, 5)
    top_logits: tuple[tuple[float, ...], ...]  # (n, 5)


@dataclass(frozen=True)
class Headroom:
    """The largest magnitude that a layer's output took, of all layers of a graph."""

    layer: str
    largest: float


@dataclass(frozen=True)
class KnownEngines:
    """A target's engines: who compiled them, from what, and how far TensorRT's network was from ONNX Runtime's graph.

    `network` is empty where that was not compared.
    """

    tensorrt: str
    files: dict[str, str]  # sha256 by name
    sources: dict[str, str]  # by graph or part, see `engine_list.source_of`
    network: dict[str, float] = field(default_factory=dict)  # largest error by stage


@dataclass(frozen=True)
class Certificate:
    """`agreement` says, by whom ONNX Runtime was compared with, the largest error of each stage as a share of the
    largest value, rounded up. `omitted` says why there are no tensors and answers; it is empty where there are."""

    fingerprint: str
    settings: str
    recipe: dict[str, Any]
    tools: dict[str, str]
    files: dict[str, str]  # sha256 by name
    tokens: dict[str, tuple[int, ...]]  # ids of each text
    tensors: dict[str, dict[str, Sketch]]  # by stage and name
    answers: dict[str, KnownAnswer] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    headroom: dict[str, Headroom] = field(default_factory=dict)
    engines: dict[str, KnownEngines] = field(default_factory=dict)
    omitted: str = ""
    schema: int = CERTIFICATE_SCHEMA

    def faults(self, vocabulary: int) -> list[str]:
        """What no replay writes."""
        found = []
        for name, answer in self.answers.items():
            rows = [len(answer.token_ids), len(answer.top_ids), len(answer.top_logits)]
            widths = {len(row) for row in (*answer.top_ids, *answer.top_logits)}
            tokens = [*answer.token_ids, *(token for row in answer.top_ids for token in row)]
            if len(set(rows)) != 1 or len(widths) != 1 or not all(0 <= token < vocabulary for token in tokens):
                found.append(f"the answer '{name}' has tokens and logits that do not go together")
        return found

    def write(self, folder: Path) -> None:
        text = json.dumps(sealed(asdict(self)), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        write_atomically(folder / CERTIFICATE, f"{text}\n".encode())


def settings_of(bundle: Bundle) -> str:
    """16 hex digits for all of a manifest that decides answers beside its files."""
    data = {name: value for name, value in asdict(bundle).items() if name not in NOT_SETTINGS}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def recipe_of(bundle: Bundle) -> dict[str, Any]:
    """What became of the weights, as a certificate says it."""
    names = ("method", "group_size", "calibration", "samples_fingerprint")
    applied = {name: bundle.quantization[name] for name in names if name in bundle.quantization}
    lora = bundle.lora and str(bundle.lora)
    return {"dtype": bundle.dtype, "precision": bundle.precision, "kv_cache": bundle.kv_cache, "lora": lora, **applied}


def has_certificate(bundle: Bundle) -> bool:
    return os.path.isfile(bundle.path / CERTIFICATE)


def read_certificate(bundle: Bundle) -> Certificate:
    """A bundle's certificate. Raises BundleError where it has none, or none that is whole and its own."""
    path = bundle.path / CERTIFICATE
    anew = Option("certify", note="on a machine whose answers are known to be right")
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise TypeError("it is no object")
        if data.get("schema") != CERTIFICATE_SCHEMA:
            raise TypeError(f"schema {data.get('schema')}, this pixtral reads schema {CERTIFICATE_SCHEMA}")
        if SEAL not in data:
            raise ValueError("it has no seal")
        certificate = from_json(Certificate, unsealed(data))
        if faults := certificate.faults(bundle.model.decoder.vocab_size):
            raise ValueError(faults[0])
    except FileNotFoundError as error:
        raise BundleError(f"{bundle.path} has no {CERTIFICATE}", anew) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", f"ls -l {path}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be right: {error}", f"pixtral inspect {bundle.path} --verify", anew
        ) from error
    if certificate.fingerprint != bundle.fingerprint:
        theirs = f"of {certificate.fingerprint}, this bundle is {bundle.fingerprint}"
        raise BundleError(f"{path} is another bundle's certificate, {theirs}", "copy the bundle whole again", anew)
    if certificate.settings != settings_of(bundle):
        raise BundleError(
            f"{path} was made for other settings than bundle.json has", "copy the bundle whole again", anew
        )
    return certificate


def known_engines(engines: EngineSet, network: Mapping[str, float]) -> KnownEngines:
    return KnownEngines(
        engines.tensorrt,
        {engine.file: engine.sha256 for engine in engines.graphs.values()},
        {graph: engine.source_sha256 for graph, engine in engines.graphs.items()},
        dict(network),
    )


def with_listed_engines(
    certificate: Certificate, bundle: Bundle, networks: Mapping[str, Mapping[str, float]]
) -> Certificate:
    """The certificate for the engines that a bundle lists now. `networks` are errors by target, where just compared."""
    listed = {}
    for target in bundle.engines:
        known = certificate.engines.get(target)
        listed[target] = known_engines(listed_engines(bundle, target), networks.get(target, {}))
        if known is not None and target not in networks:
            listed[target] = replace(listed[target], network=known.network)
    return replace(certificate, engines=listed)
