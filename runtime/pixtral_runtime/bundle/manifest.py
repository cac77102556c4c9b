"""The bundle: one folder that holds all a runtime needs, described by `bundle.json`.

    bundle.json     schema, model configuration, precision, limits, and size and sha256 of every other file
    vision.onnx  embed.onnx  decoder.onnx     graphs, with their weights in
    weights.bin     all tensors, each at a page boundary, shared by the graphs
    tekken.json     the tokenizer, with the image patch and side it was made for; or tokenizer.model.v7m1
    certificate.json    what the bundle computed where it was made, see `certificate`
    model.sig           a signature over all of it, where somebody signed it, see `signature`

`open_bundle` checks what it says of itself, and presence and sizes of the files; their bytes are `integrity`'s matter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.spec import ACTIVATION_DTYPES, GRAPHS, GraphSpec, graph_spec, kv_cache_bytes_per_token
from pixtral_runtime.errors import BundleError, InputError, unwritable
from pixtral_runtime.files import locked, sync, write_atomically
from pixtral_runtime.json_data import SEAL, from_json, sealed, unsealed

BUNDLE_SCHEMA = 1
MANIFEST = "bundle.json"
WEIGHTS = "weights.bin"
TOKENIZER = "tekken.json"
CERTIFICATE = "certificate.json"  # what the bundle computed where it was made; not one of `Bundle.files`
SIGNATURE = "model.sig"  # over the whole folder, in the OpenSSF's format
SENTENCEPIECE = "tokenizer.model.v7m1"  # Pixtral-Large's, in the other's place; its name says its kind
LOCK = ".pixtral.lock"  # held by whoever writes the bundle
PARTIAL = ".pixtral.partial"  # the folder in which it is made


@dataclass(frozen=True)
class Limits:
    """What the graphs were built for."""

    max_context: int  # tokens of prompt and answer, the rows of the rotary tables
    max_image_side: int  # pixels


@dataclass(frozen=True)
class SamplingDefaults:
    """How answers are drawn where nobody says how, as the checkpoint does."""

    temperature: float
    top_p: float

    def faults(self) -> list[str]:
        right = {
            f"temperature is {self.temperature}, expected 0 or more": self.temperature >= 0,
            f"top_p is {self.top_p}, expected more than 0 and 1 at most": 0 < self.top_p <= 1,
        }
        return [fault for fault, holds in right.items() if not holds]


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LoraId:
    """Which LoRA adapter was merged into a bundle's weights."""

    name: str  # of its folder
    sha256: str  # of its weights

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:16]})"


@dataclass(frozen=True)
class Bundle:
    """A bundle's manifest. `path` is where it lies; the rest is `bundle.json`."""

    path: Path
    model: ModelConfig
    dtype: str  # of activations: float32, float16 or bfloat16
    precision: str  # the recipe the weights went through; the dtype's name where there was none
    limits: Limits
    opset: int
    files: dict[str, FileEntry]
    tools: dict[str, str]
    preprocess: str = "mistral"
    kv_cache: str | None = None  # dtype of the KV cache where it is not that of the activations
    schema: int = BUNDLE_SCHEMA
    quantization: dict[str, Any] = field(default_factory=dict)  # how the recipe was applied
    lora: LoraId | None = None
    engines: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingDefaults | None = None  # greedy

    def faults(self) -> list[str]:
        """What no export writes: sizes that do not go together, types that there are none of."""
        if faults := self.model.faults():
            return faults
        vision, decoder, limits = self.model.vision, self.model.decoder, self.limits
        longest = vision.max_grid * vision.patch_size
        outside = [name for name in (*self.files, *_engine_files(self.engines)) if not is_inside(name)]
        right = {
            f"{', '.join(map(repr, outside[:3]))} is no file in the bundle's folder": not outside,
            f"dtype is {self.dtype}, expected {' or '.join(ACTIVATION_DTYPES)}": self.dtype in ACTIVATION_DTYPES,
            f"kv_cache is {self.kv_cache}, expected int8 or null": self.kv_cache in (None, "int8"),
            f"max_context is {limits.max_context}, the model has 1 to {decoder.max_position}": (
                0 < limits.max_context <= decoder.max_position
            ),
            f"pictures of {limits.max_image_side} px have patches that the vision encoder has no positions for, which "
            f"end at {longest} px": vision.token_edge <= limits.max_image_side <= longest,
            f"cache_scales are not {2 * decoder.n_layers} numbers": self.kv_cache is None
            or _are_numbers(self.quantization.get("cache_scales"), 2 * decoder.n_layers),
        }
        return [fault for fault, holds in right.items() if not holds] + (
            self.sampling.faults() if self.sampling else []
        )

    @property
    def own_files(self) -> list[Path]:
        """All files that belong to the bundle: what it reads, and what must not be written over."""
        beside = [name for name in (CERTIFICATE, SIGNATURE) if os.path.lexists(self.path / name)]
        return [self.path / name for name in (MANIFEST, *beside, *self.files, *_engine_files(self.engines))]

    def graph_path(self, name: str) -> Path:
        return self.path / f"{name}.onnx"

    def graph_spec(self, name: str) -> GraphSpec:
        return graph_spec(name, self.model, self.dtype, self.kv_cache)

    @property
    def cache_dtype(self) -> str:
        return self.kv_cache or self.dtype

    @property
    def tokenizer_path(self) -> Path:
        return self.path / self.tokenizer_name

    @property
    def tokenizer_name(self) -> str:
        return SENTENCEPIECE if SENTENCEPIECE in self.files else TOKENIZER

    @property
    def fingerprint(self) -> str:
        """One hash for everything that decides an answer: sha256 over the files' hashes, 16 hex digits."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}\0{self.files[name].sha256}\0".encode())
        return digest.hexdigest()[:16]

    @property
    def kv_cache_bytes_per_token(self) -> int:
        return kv_cache_bytes_per_token(self.model, self.cache_dtype)

    def write(self) -> None:
        """Write `bundle.json`, the last step of making a bundle."""
        data = {key: value for key, value in asdict(self).items() if key != "path"}
        write_atomically(self.path / MANIFEST, (json.dumps(sealed(data), indent=2, sort_keys=True) + "\n").encode())


def is_inside(name: str) -> bool:
    """Whether a relative name leads to a place in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def remake_hint(path: Path) -> str:
    return f"pixtral export CHECKPOINT -o {path} --force"


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(one, int | float) for one in value)


def _engine_files(engines: Mapping[str, Any]) -> Iterator[str]:
    """The files of engines in a manifest; what is no list of engines, as `open_engines` finds out, has none."""
    with suppress(AttributeError, KeyError, TypeError):
        for built in engines.values():
            yield from [str(entry["file"]) for entry in built["graphs"].values()]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a bundle's folder for one writer. Raises InputError where another process has it, or it is not writable."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK))
        except BlockingIOError as error:
            raise InputError(f"{folder} is being written by another export or build", "wait for it") from error
        except OSError as error:
            raise unwritable(folder, error, "check its permissions") from error
        yield


def move_up(folder: Path) -> None:
    """The new bundle in a folder's `PARTIAL`, which is whole and on the disk, takes the place of the one around it.

    The manifest goes first and comes last, so that half of a move is no bundle; whoever opens it next goes on.
    """
    partial = folder / PARTIAL
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        path.replace(folder / path.name)
    sync(folder)
    partial.rmdir()


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest and check that its files are there with the right size. Raises BundleError."""
    manifest = path / MANIFEST
    remake = remake_hint(path)
    if not os.path.isfile(manifest) and os.path.isfile(path / PARTIAL / MANIFEST):
        try:
            with writing(path):
                move_up(path)
        except OSError as error:
            raise unwritable(path, error, remake) from error
    if not os.path.isfile(manifest):
        what = f"holds no {MANIFEST}" if os.path.isdir(path) else "is not a folder"
        raise BundleError(f"{path} is no bundle: it {what}", f"pixtral export CHECKPOINT -o {path}")
    try:
        data = json.loads(manifest.read_bytes())
        schema = data["schema"]
        if schema != BUNDLE_SCHEMA:
            newer = isinstance(schema, int) and schema > BUNDLE_SCHEMA
            hint = "pip install --upgrade pixtral" if newer else remake
            raise BundleError(f"{manifest}: schema {schema}, this pixtral reads schema {BUNDLE_SCHEMA}", hint)
        bundle = from_json(Bundle, {name: value for name, value in data.items() if name != SEAL}, path=path)
    except OSError as error:
        raise BundleError(f"{manifest} cannot be read: {error.strerror}", f"ls -ld {path}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{manifest} cannot be read: {error}", remake) from error
    if faults := bundle.faults():
        raise BundleError(f"{manifest} cannot be right: {faults[0]}", remake)
    try:
        unsealed(data)
    except ValueError as error:
        raise BundleError(f"{manifest} cannot be right: {error}", remake) from error
    for name in (*(f"{graph}.onnx" for graph in GRAPHS), WEIGHTS, bundle.tokenizer_name):
        if name not in bundle.files:
            raise BundleError(f"{manifest} does not list {name}", remake)
    for name, entry in bundle.files.items():
        file = path / name
        if not os.path.isfile(file):
            raise BundleError(f"{path}: {name} is missing", remake)
        if file.stat().st_size != entry.bytes:
            raise BundleError(f"{file}: {file.stat().st_size} bytes, expected {entry.bytes}", remake)
    return bundle
