"""What torch traces, kept for a test run: each piece of a graph is traced once, by whichever process comes first.

A trace takes 3 s of processor time and an export needs seven, in every process anew. The key is all that a trace can
depend on within one run: the module with its settings, and the shapes and types of its tensors.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]

from helpers.places import MADE
from pixtral_export.graphs import assemble, trace

TRACE = trace.trace


def share_traces() -> None:
    """From now on exports of this process read the traces that the run has, and keep theirs for the others."""
    onnxscript_apis.get_torchlib_ops = functools.cache(
        onnxscript_apis.get_torchlib_ops
    )  # torch asks for each trace: 1 s
    assemble.trace = kept_trace  # type: ignore[attr-defined]


def sharing_traces() -> dict[str, str]:
    """The environment of a child process whose exports do so as well."""
    tests = Path(__file__).parents[1]
    paths = (tests / "helpers" / "children", tests, *filter(None, [os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


@functools.wraps(TRACE)
def kept_trace(module: nn.Module, inputs: Sequence[Tensor], axes: Sequence[trace.Axes]) -> ir.Model:
    if MADE not in os.environ:
        return TRACE(module, inputs, axes)
    path = Path(os.environ[MADE]) / f"{key(module, inputs, axes)}.onnx"
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            traced = TRACE(module, inputs, axes)
            ir.save(traced, path)
            assert ir.to_proto(ir.load(path)) == ir.to_proto(traced), "the kept trace is not the trace"
    return ir.load(path)


def key(*what: object) -> str:
    buffer = io.BytesIO()
    _Outline(buffer).dump(what)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class _Outline(pickle.Pickler):
    """Pickles a tensor as its shape and type, a dynamic axis as its range."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return str, (f"{value.dtype} {tuple(value.shape)}",)
        return (str, (repr(value),)) if isinstance(value, torch.export.Dim) else NotImplemented
