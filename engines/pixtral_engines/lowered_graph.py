"""A bundle's graph in the form that TensorRT gets, in memory or as a file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_engines.lowering import (
    BESIDE,
    attend_with_heads_apart,
    declared,
    dequantize_before_gather,
    drop_zero_points,
    fix_cache_rows,
    halve_codes,
)
from pixtral_engines.lowering_trt10_3 import lower_for_trt10_3
from pixtral_engines.parts import specs_of, take_part
from pixtral_runtime.backends.candidates import pick_candidates
from pixtral_runtime.backends.onnx_nodes import untie
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.integrity import unchanged
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS, GraphSpec
from pixtral_runtime.errors import BundleError, Option, SettingError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Lowered:
    """A graph that refers to its weights: files in `folder`, and values that were made for it, by name."""

    model: onnx.ModelProto
    folder: Path
    made: Mapping[str, Array]

    def save(self, path: Path, *, link: bool = False) -> None:
        """Write the graph, and beside it the weights it refers to: copies of files, or links."""
        import onnx

        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        names = set()
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == BESIDE:
                    entry.value = f"{path.stem}.{tensor.name}"
                    path.with_name(entry.value).write_bytes(self.made[tensor.name].tobytes())
                elif entry.key == "location":
                    names.add(entry.value)
        for name in names:
            if link:
                path.with_name(name).hardlink_to(self.folder / name)
            elif not path.with_name(name).exists():
                shutil.copyfile(self.folder / name, path.with_name(name))
        path.write_bytes(model.SerializeToString())


def lower(
    path: Path, cache_rows: int, *, compat: bool = False, part: GraphSpec | None = None, cuts: Sequence[int] = ()
) -> Lowered:
    """Rewrite a bundle's graph, or one part of a decoder with `cuts`, for TensorRT. Raises BundleError where damaged.

    `compat`: for TensorRT 10.3.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}", f"pixtral inspect {path.parent} --verify") from error
    fix_cache_rows(model, cache_rows)
    if part is not None:
        take_part(model, part, cuts)
    turned = untie(model, path.parent)
    model.graph.initializer.extend(declared(name, data, kind, data.shape) for name, (data, kind) in turned.items())
    made = {name: data for name, (data, _) in turned.items()}
    drop_zero_points(model)
    dequantize_before_gather(model)
    if compat:
        lower_for_trt10_3(model)
    else:
        attend_with_heads_apart(model)
        pick_candidates(model)
    return Lowered(model, path.parent, made if compat else halve_codes(model, path.parent, made))


def save_graphs(
    bundle: Bundle, folder: Path, cache_rows: int, *, compat: bool = False, cuts: Sequence[int] = ()
) -> None:
    """Write a bundle's graphs as TensorRT gets them, into a new or an empty folder. Raises SettingError for another."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} is there and is no empty folder", Option("save_onnx", "ANOTHER"))
    with unchanged(bundle):
        folder.mkdir(parents=True, exist_ok=True)
        for graph in GRAPHS:
            for name, spec in specs_of(bundle, graph, cuts, compat=compat).items():
                lowered = lower(bundle.graph_path(graph), cache_rows, compat=compat, part=spec, cuts=cuts)
                lowered.save(folder / f"{name}.onnx")
