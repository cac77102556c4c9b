"""What TensorRT compiled, read out of an engine without a GPU: each profile's kernels, what they read and write.

The compiler writes its program as text into the plan: a declaration for each tensor, then a line for each kernel. The
format is not documented, so it is read for the versions it was learned from and for no others.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from pixtral_runtime.errors import EngineError

KNOWN = ("tensorrt_rtx", "1.7.")
"""The package, and how versions begin whose plans are understood."""

BITS = {
    "bool": 8,
    "int4": 4,
    "fp4": 4,
    "int8": 8,
    "fp8": 8,
    "half": 16,
    "bf16": 16,
    "float": 32,
    "int32": 32,
    "int64": 64,
}
START, MAIN = b'  inputs={ "', b"  input_myl_place="  # programs of fusions lack the second
HEADER_BYTES = 1 << 20  # within which the second follows
DECLARED = re.compile(
    r'\s*(?:sub_)?tensor=\{ .*?dims=\{(?P<dims>[^}]*)\}.*? name="(?P<name>[^"]*)".* type=(?P<type>\w+)'
)
CALLED = re.compile(r'\s*(?P<kind>function|fully_connected|runtime_fusion)=\{ name="?(?P<name>[^"\s]+)')
READ, WRITTEN = re.compile(r"\binput(?:_args)?=\{([^}]*)\}"), re.compile(r"\boutput(?:_args)?=\{([^}]*)\}")
OF_PROFILE = re.compile(r"(?: \[profile (\d+)\])?\.\d+$")  # ends the names of a network's inputs and outputs
OUTPUTS, QUOTED = "  outputs={", r'"([^"]*)"'
LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class PlanTensor:
    """`dims` has None where the size is known when the engine runs: slots, or what follows from them."""

    name: str
    dims: tuple[int | None, ...]
    type: str  # as the compiler calls it: half, int4 …
    is_constant: bool

    @property
    def bytes(self) -> int:
        """With one for each size that is not known yet: one slot."""
        return math.prod(dim or 1 for dim in self.dims) * BITS.get(self.type, 64) // 8


@dataclass(frozen=True)
class Kernel:
    """`kind` is function, fully_connected or runtime_fusion: a product, alone or with what is computed around it."""

    kind: str
    name: str
    reads: tuple[PlanTensor, ...]
    writes: tuple[PlanTensor, ...]
    layers: tuple[str, ...]  # nodes of the graph

    @property
    def is_product(self) -> bool:
        return self.kind != "function"

    @property
    def is_attention(self) -> bool:
        return "_mha_" in self.name

    @cached_property
    def moves(self) -> tuple[PlanTensor, ...]:
        """What it reads or writes as a whole: not the cache that it adds rows to, nor tables that it gathers from."""
        named = {tensor.name: tensor for tensor in (*self.reads, *self.writes)}
        in_place = {tensor.name for tensor in self.reads} & {tensor.name for tensor in self.writes}
        gathers = "Gath" in self.name
        return tuple(
            tensor
            for name, tensor in named.items()
            if name not in in_place and not (gathers and tensor.is_constant and len(tensor.dims) > 1)
        )

    @property
    def moved_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.moves)


@dataclass(frozen=True)
class Program:
    """One profile's. Names of outputs are the graph's; `kernels` are in the order in which they start."""

    profile: int
    outputs: tuple[str, ...]
    kernels: tuple[Kernel, ...]


def refuse_unknown_version(package: ModuleType) -> None:
    """Raise EngineError for a TensorRT whose plans were never looked at."""
    name, version = KNOWN
    if package.__name__ != name or not package.__version__.startswith(version):
        raise EngineError(
            f"what {package.__name__} {package.__version__} compiles is not known here: plans of {name} {version}x are",
            f"pip install '{name}=={version}*', or read it with NVIDIA's tools",
        )


def read_programs(path: Path) -> list[Program]:
    """The programs of an engine's profiles, in their order. Raises EngineError where none is found."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        programs = [_parse(text) for text in _texts(plan)]
    if not programs:
        raise EngineError(f"{path} holds no program that is understood", "build it anew")
    return sorted(programs, key=lambda program: program.profile)


def _texts(plan: mmap.mmap) -> Iterator[str]:
    """Texts of main programs. Weights lie between them, so they are sought rather than everything read."""
    place = plan.find(START)
    while place >= 0:
        end = plan.find(b"\0", place)
        end = len(plan) if end < 0 else end
        if plan.find(MAIN, place, min(end, place + HEADER_BYTES)) >= 0:
            yield plan[place:end].decode("ascii", errors="replace")
        place = plan.find(START, end)


def _parse(text: str) -> Program:
    lines = text.split("\n")
    outputs = [name for line in lines if line.startswith(OUTPUTS) for name in re.findall(QUOTED, line)]
    found = next((ends[1] for name in re.findall(QUOTED, lines[0]) if (ends := OF_PROFILE.search(name))), None)
    tensors = {tensor.name: tensor for line in lines if (tensor := _tensor(line))}
    kernels = tuple(kernel for line in lines if (kernel := _kernel(line, tensors)))
    return Program(int(found or 0), tuple(map(_plain, outputs)), kernels)


def _tensor(line: str) -> PlanTensor | None:
    if (found := DECLARED.match(line)) is None:
        return None
    dims = tuple(int(dim) if dim.isdecimal() else None for dim in found["dims"].split())
    return PlanTensor(_plain(found["name"]), dims, found["type"].partition("_")[0], "const_payload_size=" in line)


def _kernel(line: str, tensors: dict[str, PlanTensor]) -> Kernel | None:
    if (found := CALLED.match(line)) is None or found["name"].startswith("shape_"):
        return None
    read, written = READ.search(line), WRITTEN.search(line)

    def named(match: re.Match[str] | None) -> tuple[PlanTensor, ...]:
        names = map(_plain, re.findall(QUOTED, match[1] if match else ""))
        return tuple(tensors[name] for name in dict.fromkeys(names) if name in tensors)

    layers = tuple(dict.fromkeys(LAYER.findall(line)))
    return Kernel(found["kind"], found["name"], named(read), named(written), layers)


def _plain(name: str) -> str:
    return OF_PROFILE.sub("", name)
