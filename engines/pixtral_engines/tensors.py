"""What the meanings of layers share: tensors as a network declares them, and values as they are computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixtral_engines.arrays import NUMPY_DTYPES
from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import PixtralError

INTEGERS = (np.int64, np.int32, np.bool_)


class UnknownLayer(PixtralError):
    """A network holds a layer that the interpreter has no meaning for."""

    def __init__(self, layer: Any, what: str) -> None:
        message = f"the interpreter does not know {what} of layer '{layer.name}'"
        super().__init__(message, "pip install --upgrade pixtral, or add it to pixtral_engines/layer_semantics.py")


@dataclass(frozen=True)
class Tensor:
    """A tensor as the network declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # -1 where it changes from call to call

    @classmethod
    def of(cls, tensor: Any) -> Tensor:
        return cls(tensor.name, tensor.dtype.name, tuple(tensor.shape))

    def refusal(self, value: Array) -> str:
        """Why a value cannot be this tensor; empty where it can."""
        fits = len(value.shape) == len(self.shape) and all(
            n in (-1, m) for n, m in zip(self.shape, value.shape, strict=True)
        )
        if fits and value.dtype == NUMPY_DTYPES[self.dtype]:
            return ""
        return f"{self.name} is {value.dtype} {value.shape}, expected {NUMPY_DTYPES[self.dtype]} {self.shape}"


Evaluate = Callable[[Any, Sequence[Array], Tensor], Array | tuple[Array, ...]]
"""A layer's meaning: the layer, its inputs (None where one is left out) and what its first output is declared as, to
the output in whatever type it was computed in, or to all of them."""


def wide(x: Array) -> Array:
    """Floats and codes as float32; integers that count or index stay as they are."""
    return x if x.dtype in INTEGERS else x.astype(np.float32, copy=False)
