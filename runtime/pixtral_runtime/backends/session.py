"""What the runtime asks of a backend: run one graph, and keep a key/value cache on the device.

ONNX Runtime implements it in `ort_session`, TensorRT in `trt_session`; sampling and scheduling know only this file.
Arrays are NumPy on the host, or a backend's own buffers, handed from one graph's output to another's input uncopied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from pixtral_runtime.bundle.spec import PREFILL_CHUNK_TOKENS

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


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Run the graph. Feeds are named as in `spec`; a decoder gets its cache here and updates it in place."""

    def new_cache(self, slots: int, rows: int) -> KVCache:
        """A zeroed cache for this graph. Decoder only."""


@dataclass(frozen=True)
class Sessions:
    """A bundle's graphs, ready to run.

    `chunk` is how many tokens of a prompt they take at a time. `slots` and `context` are what engines were built for:
    the most slots and, per slot, cache rows; None where there is no such limit. Engines decode one token a slot and
    step; `drafts` says that these graphs take several.
    """

    vision: Session
    embed: Session
    decoder: Session
    chunk: int = field(default=PREFILL_CHUNK_TOKENS, kw_only=True)
    slots: int | None = field(default=None, kw_only=True)
    context: int | None = field(default=None, kw_only=True)
    drafts: bool = field(default=True, kw_only=True)
