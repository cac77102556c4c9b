"""What the runtime asks of a backend: run one graph, and keep a key/value cache on the device.

ONNX Runtime implements it in `ort_session`, TensorRT in `trt_session`; sampling and scheduling know only this file.
Arrays are NumPy on the host, or a backend's own buffers, handed from one graph's output to another's input uncopied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy.typing as npt

from pixtral_runtime.bundle.spec import PREFILL_CHUNK_TOKENS, CachePairs, GraphSpec
from pixtral_runtime.errors import InputError

Array = npt.NDArray[Any]


class Buffer(Protocol):
    """A tensor where the backend keeps it."""

    def numpy(self) -> Array:
        """Copy to the host."""


class KVCache(Protocol):
    """Past keys and values of all layers, (slots, K, rows, E) each, updated in place by the decoder."""

    @property
    def slots(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def reserve(self, rows: int) -> None:
        """Grow to at least `rows` rows a slot, keeping what is there."""

    def shrink(self, rows: int) -> None:
        """Give memory back, keeping at least `rows` rows a slot."""

    def view(self, start: int, stop: int) -> KVCache:
        """Slots `start` to `stop` as a cache over the same memory. Good until this one grows or shrinks."""

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of one slot to another."""

    def layers(self) -> list[tuple[Array, Array]]:
        """Key and value of each layer on the host, (slots, K, rows, E) each. No copies: the next step changes them."""


class BackendCache(KVCache, Protocol):
    """A cache as its own backend sees it."""

    @property
    def tensors(self) -> CachePairs:
        """What it holds memory for."""


AnyBackendCache = TypeVar("AnyBackendCache", bound=BackendCache)


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Run the graph. Feeds are named as in `spec`; a decoder gets its cache here and updates it in place.

        Raises InputError if the cache is not one that this graph's `new_cache` makes, or is missing.
        """

    def new_cache(self, slots: int, rows: int) -> KVCache:
        """A zeroed cache for this graph. Decoder only."""


@dataclass
class GraphUse:
    """Whether a session records runs that recur as CUDA graphs, and how often it ran which way.

    `kind` is "built-in" where TensorRT-RTX records graphs by itself, and does not say when it replays one. `graphs`
    counts what was recorded. `refused` says why a session that was to capture does not.
    """

    kind: Literal["off", "built-in", "captured"]
    plain: int = 0
    replayed: int = 0
    refused: str = ""
    graphs: int = 0


@dataclass(frozen=True)
class Sessions:
    """A bundle's graphs, ready to run.

    `chunk` is how many tokens of a prompt they take at a time. `slots` and `context` are what engines were built for:
    the most slots and, per slot, cache rows; None where there is no such limit. Engines decode one token a slot and
    step; `drafts` says that these graphs take several. `replays` says that steps of few shapes are faster, as each is
    replayed: then a step takes a power of two of slots, and all of their logits. `picks` says that the decoder picks
    candidates: it takes `inverse_temperature` (R,) float32 as well, and gives `picked` (`ort_cuda_lowering`).
    `prompt_step`: pieces of prompts are filled up to a multiple of so many tokens, where each number is compiled anew.
    `free_bytes` is what a device has left for caches and what a step needs beside them; None on a CPU.
    """

    vision: Session
    embed: Session
    decoder: Session
    chunk: int = field(default=PREFILL_CHUNK_TOKENS, kw_only=True)
    prompt_step: int = field(default=1, kw_only=True)
    slots: int | None = field(default=None, kw_only=True)
    context: int | None = field(default=None, kw_only=True)
    drafts: bool = field(default=True, kw_only=True)
    replays: bool = field(default=False, kw_only=True)
    picks: bool = field(default=False, kw_only=True)
    free_bytes: int | None = field(default=None, kw_only=True)


def own_cache(graph: GraphSpec, cache: KVCache | None, kind: type[AnyBackendCache]) -> AnyBackendCache | None:
    """The cache of a run as the kind that a backend binds; None for a graph that has none.

    Raises InputError if the cache is missing, of another kind, of other tensors (names, sizes or dtype), or one too
    many: ignoring it would give an answer, and a wrong one.
    """
    if not graph.caches:
        if cache is not None:
            raise InputError(f"{graph.name} has no cache, seen {type(cache).__name__}")
        return None
    hint = f"hand over what new_cache of the {graph.name} session returns"
    if cache is None:
        raise InputError(f"{graph.name} needs a cache, {_shown(graph.caches)}: none was handed over", hint)
    if not isinstance(cache, kind):
        raise InputError(
            f"{graph.name} runs here on a cache of the kind {kind.__name__}, seen {type(cache).__name__}", hint
        )
    if cache.tensors != graph.caches:
        raise InputError(f"{graph.name}'s cache is {_shown(graph.caches)}, seen {_shown(cache.tensors)}", hint)
    return cache


def _shown(tensors: CachePairs) -> str:
    ends = (tensors[0][0], tensors[-1][0])
    return " to ".join(f"{past.name} ({' × '.join(map(str, past.shape))}, {past.dtype})" for past in ends)
