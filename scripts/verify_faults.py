"""Faults that `pixtral verify` must find: what disks, copies, exports, packages and people do to a bundle.

Most are planted as an export would have made them: the manifest's hashes are right afterwards and the certificate is
bound to the new files, so that only what the bundle computes can tell. Those in `files` and `certificate` are left as a
disk or a person left them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from pixtral_runtime.bundle.certificate import read_certificate, settings_of, with_listed_engines
from pixtral_runtime.bundle.engine_list import Engine, EngineSet, source_of, with_engines
from pixtral_runtime.bundle.manifest import CERTIFICATE, MANIFEST, WEIGHTS, Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.json_data import SEAL, sealed

Array = npt.NDArray[Any]
DTYPES = {onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT8: np.int8}
TARGET = "rtx:sm89"


@dataclass(frozen=True)
class Fault:
    """`stage` is the one that must be named; "refused" where the bundle must not even be read."""

    name: str
    stage: str
    plant: Callable[[Path], None]
    is_hidden: bool = True  # hashes and certificate are made to fit afterwards


def rebind(folder: Path) -> None:
    """Make manifest and certificate fit files and settings that were changed."""
    manifest = {key: value for key, value in json.loads((folder / MANIFEST).read_bytes()).items() if key != SEAL}
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    bundle = open_bundle(folder)
    bind = {"fingerprint": bundle.fingerprint, "settings": settings_of(bundle)}
    change_certificate(folder, lambda data: data.update(bind))


def change_certificate(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    data = json.loads((folder / CERTIFICATE).read_bytes())
    before = data.pop(SEAL)
    change(data)
    whole = sealed(data) if seal else {**data, SEAL: before}
    (folder / CERTIFICATE).write_text(json.dumps(whole), encoding="utf-8")


def flip(path: Path, share: float = 0.5) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def flipped(name: str, share: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: flip(folder / name, share)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def edit(folder: Path, graph: str, name: str, change: Callable[[Array], Array]) -> None:
    """Change a weight where it lies in the weight file; int4 codes are seen as bytes of two."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.name == name)
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    packed = tensor.data_type not in DTYPES
    shape = (*tensor.dims[:-1], tensor.dims[-1] // 2) if packed else tuple(tensor.dims)
    dtype = np.uint8 if packed else DTYPES[tensor.data_type]
    weights = np.memmap(folder / WEIGHTS, np.uint8, "r+", place["offset"], place["length"])
    old = np.frombuffer(weights.tobytes(), dtype).reshape(shape)
    new = np.ascontiguousarray(change(old).astype(dtype))
    if np.array_equal(old, new):
        raise ValueError(f"{name} is as it was")
    weights[:] = np.frombuffer(new.tobytes(), np.uint8)
    weights.flush()


def weight(graph: str, name: str, change: Callable[[Array], Array]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, graph, name, change)


def every(graph: str, end: str, change: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Change all weights whose names end so, where that changes something."""

    def plant(folder: Path) -> None:
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name.endswith(end) and (*tensor.dims, 1)[0] > 1:
                edit(folder, graph, tensor.name, change)

    return plant


def turned(values: Array) -> Array:
    return values.T.reshape(values.shape)


def rolled(steps: int, axis: int) -> Callable[[Array], Array]:
    return lambda values: np.roll(values, steps, axis)


def exchange(graph: str, one: str, other: str) -> Callable[[Path], None]:
    """Two layers change places."""

    def plant(folder: Path) -> None:
        path = folder / f"{graph}.onnx"
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.external_data and (one in tensor.name or other in tensor.name):
                tensor.name = tensor.name.replace(one, "\0").replace(other, one).replace("\0", other)
        onnx.save(model, path)

    return plant


def nodes(graph: str, op: str, change: Callable[[onnx.NodeProto], None], most: int | None = None) -> Any:
    """Change the first `most` nodes of a kind in a graph."""

    def plant(folder: Path) -> None:
        path = folder / f"{graph}.onnx"
        model = onnx.load(path, load_external_data=False)
        found = [node for node in model.graph.node if node.op_type == op][:most]
        if not found:
            raise ValueError(f"{graph} has no {op}")
        for node in found:
            change(node)
        onnx.save(model, path)

    return plant


def attribute(name: str, value: object) -> Callable[[onnx.NodeProto], None]:
    def change(node: onnx.NodeProto) -> None:
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def other_input(place: int, value: str | int) -> Callable[[onnx.NodeProto], None]:
    """An input becomes another tensor, or what another input of the node is."""

    def change(node: onnx.NodeProto) -> None:
        node.input[place] = node.input[value] if isinstance(value, int) else value

    return change


def other_base(graph: str, table: str, power: float) -> Callable[[Path], None]:
    """Rotary tables of another base: each frequency to a power."""

    def plant(folder: Path) -> None:
        edit(folder, graph, f"{table}.cos", lambda old: np.cos(angles(old.shape)))
        edit(folder, graph, f"{table}.sin", lambda old: np.sin(angles(old.shape)))

    def angles(shape: tuple[int, ...]) -> Array:
        frequencies = (1e4 ** -(np.arange(shape[1]) / shape[1])) ** power
        return np.outer(np.arange(shape[0]) if graph == "decoder" else np.arange(shape[0]) % 32, frequencies)

    return plant


def manifest_edit(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_bytes())
        del data[SEAL]
        (folder / MANIFEST).write_text(json.dumps(sealed(data | changes)), encoding="utf-8")

    return plant


def tokenizer_edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        data = json.loads((folder / "tekken.json").read_bytes())
        change(data)
        (folder / "tekken.json").write_text(json.dumps(data), encoding="utf-8")

    return plant


def shift_words(data: dict[str, Any]) -> None:
    """Each word behind the 256 bytes gets the number of the one before it."""
    words = data["vocab"][256:]
    for number, (one, next_one) in enumerate(zip(words, [*words[1:], words[0]], strict=True)):
        data["vocab"][256 + number] = {**next_one, "rank": one["rank"]}


def add_engines(folder: Path) -> Bundle:
    """Engines by name only, in manifest and certificate: nothing here runs them."""
    bundle, graphs = open_bundle(folder), {}
    (folder / "engines").mkdir(exist_ok=True)
    for graph in GRAPHS:
        path = folder / "engines" / f"{graph}.engine"
        path.write_bytes(graph.encode() * 1000)
        source = source_of(bundle, graph)
        graphs[graph] = Engine(f"engines/{path.name}", path.stat().st_size, sha256_of_file(path), source, [])
    listed = with_engines(bundle, EngineSet(TARGET, "tensorrt_rtx 1.7", bundle.precision, 512, 1, 64, graphs))
    listed.write()
    with_listed_engines(read_certificate(listed), listed, {}).write(folder)
    return listed


def engine_fault(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change an engine and how the manifest lists it."""

    def plant(folder: Path) -> None:
        bundle = add_engines(folder)
        engines = json.loads(json.dumps(bundle.engines))
        change(folder, engines[TARGET]["graphs"]["decoder"])
        replace(bundle, engines=engines).write()

    return plant


def _another_plan(folder: Path, entry: dict[str, Any]) -> None:
    (folder / entry["file"]).write_bytes(b"other" * 1400)
    entry |= {"bytes": 7000, "sha256": sha256_of_file(folder / entry["file"])}


def faults(bundle: Bundle, other: Path) -> Iterator[Fault]:
    """All that can be planted in a bundle of the demo checkpoint. `other` is a bundle of another recipe."""
    yield from _damage(bundle, other)
    yield from _settings()
    yield from _of_vision(bundle)
    yield from _of_embed(bundle)
    yield from _of_decoder(bundle)
    if bundle.precision != bundle.dtype:
        yield from _of_quantization(bundle)


def _damage(bundle: Bundle, other: Path) -> Iterator[Fault]:
    for name in bundle.files:
        yield Fault(f"a bit of {name}", "files", flipped(name), False)
    yield Fault("a bit of the weights' end", "files", flipped(WEIGHTS, 1.0), False)
    for name in (MANIFEST, CERTIFICATE):
        yield Fault(f"a bit of {name}", "refused", flipped(name, 0.3), False)
    yield Fault("weights cut off", "refused", lambda f: cut(f / WEIGHTS), False)
    yield Fault("no certificate", "refused", lambda folder: (folder / CERTIFICATE).unlink(), False)
    copy = (other / CERTIFICATE).read_bytes()
    yield Fault(
        "another bundle's certificate", "refused", lambda f: _discard((f / CERTIFICATE).write_bytes(copy)), False
    )
    unsealed = Fault(
        "a certificate whose answer was changed", "refused",
        lambda f: change_certificate(f, lambda data: data["answers"]["disc"].update(text="no"), seal=False), False,
    )  # fmt: skip
    yield unsealed
    yield Fault(
        "another certificate, bound to this bundle", "", lambda f: _discard((f / CERTIFICATE).write_bytes(copy))
    )
    yield Fault(
        "a known answer that is wrong", "answers",
        lambda f: change_certificate(f, lambda data: data["answers"]["disc"]["token_ids"].__setitem__(-1, 5)),
    )  # fmt: skip
    source = "0" * 64
    yield Fault("a stale engine", "engines", engine_fault(lambda _, e: e.update(source_sha256=source)), False)
    yield Fault("another plan in an engine's place", "engines", engine_fault(_another_plan), False)
    yield Fault("a bit of an engine", "engines", engine_fault(lambda f, e: flip(f / e["file"])), False)
    yield Fault("no engine", "engines", engine_fault(lambda f, e: (f / e["file"]).unlink()), False)


def _discard(_: object) -> None:
    return None


def _settings() -> Iterator[Fault]:
    yield Fault("other preprocessing, unsaid", "refused", manifest_edit(preprocess="hf"), False)
    yield Fault("other preprocessing", "preprocess", manifest_edit(preprocess="hf"))
    yield Fault("smaller pictures", "preprocess", manifest_edit(limits={"max_context": 4096, "max_image_side": 128}))
    yield Fault("another vocabulary", "tokenizer", tokenizer_edit(shift_words))
    words = tokenizer_edit(lambda data: data["config"].update(pattern=r"\s+|\S"))
    yield Fault("words cut up otherwise", "tokenizer", words)


def _of_vision(bundle: Bundle) -> Iterator[Fault]:
    layers, adapter = "vision_encoder.transformer.layers.{}.", "vision_language_adapter."
    first = layers.format(0)
    yield _weight("vision", f"{first}attention.wq.weight transposed", turned)
    yield _weight("vision", f"{adapter}w_out.weight transposed", turned)
    yield _weight("vision", f"{first}attention.wo.weight heads rolled", rolled(32, 0))
    yield _weight("vision", "vision_encoder.patch_conv.weight blue for red", lambda values: values[:, ::-1])
    if bundle.precision == bundle.dtype:  # less than the noise of rounded inputs, here where norms hardly scale
        yield _weight("vision", f"{adapter}w_in.bias dropped", np.zeros_like)
    yield _weight("vision", "vision_encoder.ln_pre.weight dropped", np.ones_like)
    yield _scaled(bundle, "vision", f"{layers.format(2)}feed_forward.w2.weight")
    yield Fault("vision layers exchanged", "vision", exchange("vision", layers.format(1), layers.format(2)))
    yield Fault("vision's rotary base", "vision", other_base("vision", "vision_rope", 1.2))
    yield Fault("vision's rotation in pairs", "vision", nodes("vision", "RotaryEmbedding", attribute("interleaved", 1)))
    yield Fault("vision's attention unscaled", "vision", nodes("vision", "Attention", attribute("scale", 1.0)))
    tanh = nodes("vision", "Sigmoid", lambda node: setattr(node, "op_type", "Tanh"))
    yield Fault("another activation in vision", "vision", tanh)


def _of_embed(bundle: Bundle) -> Iterator[Fault]:
    yield _weight("embed", "tok_embeddings.weight rolled by a row", rolled(1, 0))
    yield _scaled(bundle, "embed", "tok_embeddings.weight")
    swapped = nodes("embed", "Where", lambda node: node.input.__setitem__(slice(1, 3), node.input[:0:-1]))
    yield Fault("pictures for words", "embed", swapped)
    yield Fault("words as columns", "graphs", nodes("embed", "Gather", attribute("axis", 1), 1))
    beyond = nodes("embed", "Gather", lambda node: node.input.__setitem__(1, "token_ids"))
    yield Fault("features by the numbers of words", "embed", beyond)  # which are beyond them: it cannot be computed


def _of_decoder(bundle: Bundle) -> Iterator[Fault]:
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"):
        yield _weight("decoder", f"layers.0.{name}.weight transposed", turned)
    packed = 2 if bundle.precision == "int4" else 1
    yield _weight("decoder", "layers.1.attention.wk.weight heads rolled", rolled(32 // packed, 1))
    yield _weight("decoder", "output.weight rolled by a token", rolled(1, 1))
    if bundle.precision == bundle.dtype:  # as above
        yield _weight("decoder", "layers.1.attention_norm.weight dropped", np.ones_like)
        yield _weight("decoder", "norm.weight dropped", np.ones_like)
    yield _scaled(bundle, "decoder", "layers.1.feed_forward.w2.weight")
    yield _scaled(bundle, "decoder", "layers.2.attention.wo.weight")
    yield Fault("layers exchanged", "decoder", exchange("decoder", "layers.0.", "layers.1."))
    yield Fault("last layers exchanged", "decoder", exchange("decoder", "layers.1.", "layers.2."))
    yield Fault("another rotary base", "decoder", other_base("decoder", "decoder_rope", 1.25))
    yield Fault("rotation in pairs", "decoder", nodes("decoder", "RotaryEmbedding", attribute("interleaved", 1)))
    yield Fault("no mask", "decoder", nodes("decoder", "Attention", lambda node: node.input.pop()))
    yield Fault("no mask in one layer", "decoder", nodes("decoder", "Attention", lambda node: node.input.pop(), 1))
    yield Fault("attention unscaled", "decoder", nodes("decoder", "Attention", attribute("scale", 1.0)))
    yield Fault("no residual", "decoder", nodes("decoder", "Add", other_input(0, 1), 1))
    yield Fault("keys as values", "decoder", nodes("decoder", "Attention", other_input(2, 1), 1))
    tanh = nodes("decoder", "Sigmoid", lambda node: setattr(node, "op_type", "Tanh"), 1)
    yield Fault("another activation", "decoder", tanh)


def _of_quantization(bundle: Bundle) -> Iterator[Fault]:
    if bundle.precision == "int4":
        exchanged = every("decoder", "feed_forward.w2.weight", lambda codes: (codes >> 4) | (codes << 4))
        yield Fault("halves of bytes exchanged", "decoder", exchanged)
        larger = every("decoder", "_scale", lambda scales: scales[np.arange(len(scales)) // 2 * 2])
        yield Fault("scales of twice the group", "decoder", larger)
        yield Fault("scales rolled by a group", "decoder", every("decoder", "_scale", rolled(1, 0)))
    yield Fault("scales rolled by a column", "decoder", every("decoder", "_scale", rolled(1, -1)))
    yield _weight("decoder", "output.weight_scale rolled by a column", rolled(1, -1))


def _weight(stage: str, what: str, change: Callable[[Array], Array]) -> Fault:
    return Fault(what, stage, weight(stage, what.partition(" ")[0], change))


def _scaled(bundle: Bundle, graph: str, name: str) -> Fault:
    """By a quarter; quantized, where a quarter is no more than noise, to twice of it by its scales."""
    model = onnx.load(bundle.graph_path(graph), load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    target = f"{name}_scale" if f"{name}_scale" in names else name
    factor = 1.25 if bundle.precision == bundle.dtype else 2.0
    return Fault(f"{name} times {factor}", graph, weight(graph, target, lambda values: values * factor))
