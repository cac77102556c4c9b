"""Rewrites of a bundle's graphs for ONNX Runtime's CUDA provider, made in memory when a bundle is opened.

Each keeps the numbers as they are and picks a better kernel. Shapes: B slots, N query heads, K key heads, T tokens,
C cache rows, E head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.candidates import pick_candidates
from pixtral_runtime.backends.onnx_nodes import add_constants, drop_unread, mapped, replace_nodes, untie
from pixtral_runtime.backends.ort_cuda_attention import attend_by_length, put_rows_first
from pixtral_runtime.errors import BundleError, extra_missing

if TYPE_CHECKING:
    import onnx

LOWERED = ".lowered"  # what the names of weights made here end with
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
WIDE_FLOAT_PRODUCT = 8192  # columns from which a product of float weights fills the device by itself


class Weight(NamedTuple):
    """An initializer made here, to be handed over beside the graph. `kind` is onnx.TensorProto's.

    Codes of 4 bits have a byte each in `data` and fill its first half: ONNX Runtime takes arrays of their shape only.
    """

    data: npt.NDArray[Any]
    kind: int


class Lowered(NamedTuple):
    """`rows_first`: the cache is (B, C, K·E) instead of (B, K, C, E)."""

    graph: bytes
    weights: dict[str, Weight]
    rows_first: bool = False


def lowered(path: Path, *, by_length: bool = True, block: int | None = None) -> Lowered:
    """A bundle's graph as the CUDA provider is to get it. Raises MissingPackageError without onnx, BundleError for a
    file that is no graph.

    `by_length` False leaves attention as it is, to measure what
    that brings. `block`: codes get scales for so many rows, each repeated where they have scales for more.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise extra_missing("onnx", "gpu", "Running a bundle on a CUDA device") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"{path} is damaged: {error}", f"pixtral inspect {path.parent} --verify") from error
    rows_first = False
    if by_length:
        attend_by_length(model)
        rows_first = put_rows_first(model)
    widen_gathered_codes(model)
    weights = {name: Weight(*values) for name, values in untie(model, path.parent).items()}
    model.graph.initializer.extend(_placeholder(name, weight) for name, weight in weights.items())
    weights = join_products(model, path.parent, block, weights)
    add_and_normalize(model)
    pick_candidates(model)
    return Lowered(model.SerializeToString(), weights, rows_first)


@dataclass(frozen=True)
class _Product:
    """x @ weight, where the weight (K, N) lies in the weight file, or its codes and their scales (K/block, N) do."""

    node: onnx.NodeProto
    weight: onnx.TensorProto
    scales: onnx.TensorProto | None = None
    block: int = 0


def join_products(
    model: onnx.ModelProto,
    folder: Path,
    block: int | None = None,
    made: Mapping[str, Weight] = MappingProxyType({}),
) -> dict[str, Weight]:
    """Products of one tensor (queries, keys, values; gate and up) become one, which is split. Returns its weights,
    and those of `made`, which are not in the weight file, where they are still read.

    A step's products are bound by how fast weights are read, and narrow ones read slowly: on an H200 the keys of the
    12B in int4 at a fourth of the speed that all three have together. `block` is that of `lowered`.
    """
    groups: dict[tuple[str, int, int], list[_Product]] = {}
    for product in _products(model):
        groups.setdefault((product.node.input[0], product.weight.data_type, product.block), []).append(product)
    joined = _Joined(model, folder, made, {}, [])
    instead: dict[str, list[onnx.NodeProto]] = {}  # of a product's node, by its output
    for (_, _, own_block), members in groups.items():
        repeats = own_block // block if block and own_block % block == 0 else 1
        if repeats > 1 or _gains(members):
            first, *others = (member.node.output[0] for member in members)
            instead |= {output: [] for output in others}
            instead[first] = joined.nodes(members, repeats)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda copy: np.copyto(*copy), joined.copies))
    replace_nodes(model, [new for node in model.graph.node for new in instead.get(node.output[0], [node])])
    drop_unread(model)
    read = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(_placeholder(name, weight) for name, weight in joined.weights.items())
    return joined.weights | {name: weight for name, weight in made.items() if name in read}


def _gains(products: Sequence[_Product]) -> bool:
    """Whether products are faster as one. Codes are read below the device's bandwidth at any width."""
    is_wide = max(int(product.weight.dims[1]) for product in products) >= WIDE_FLOAT_PRODUCT
    return len(products) > 1 and (products[0].block > 0 or not is_wide)


@dataclass(frozen=True)
class _Joined:
    """Weights of joined products. Those of `copies` (to, from) are still to be copied, which threads do together."""

    model: onnx.ModelProto
    folder: Path
    made: Mapping[str, Weight]
    weights: dict[str, Weight]
    copies: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]

    def nodes(self, products: Sequence[_Product], repeats: int) -> list[onnx.NodeProto]:
        """The nodes of several products as one, each scale `repeats` times."""
        from onnx import helper

        x, weight = products[0].node.input[0], "+".join(product.weight.name for product in products) + LOWERED
        outputs, nodes = [product.node.output[0] for product in products], []
        self.weights[weight] = self._side_by_side([product.weight for product in products])
        if block := products[0].block:
            scales = [product.scales for product in products if product.scales is not None]
            values = np.concatenate([self._values(one) for one in scales], 1).repeat(repeats, 0)
            self.weights[f"{weight}_scale"] = Weight(values, scales[0].data_type)
            read, weight = [weight, f"{weight}_scale"], f"{weight}.wide"
            nodes = [helper.make_node("DequantizeLinear", read, [weight], axis=0, block_size=block // repeats)]
        if len(products) == 1:
            return [*nodes, helper.make_node("MatMul", [x, weight], outputs)]
        whole, widths = f"{weight}.product", f"{weight}.widths"
        add_constants(self.model, **{widths: [product.weight.dims[1] for product in products]})
        nodes.append(helper.make_node("MatMul", [x, weight], [whole]))
        return [*nodes, helper.make_node("Split", [whole, widths], outputs, axis=-1)]

    def _side_by_side(self, tensors: Sequence[onnx.TensorProto]) -> Weight:
        """Tensors (K, N) as one, (K, sum of N). Codes of 4 bits stay packed, two of a row in a byte."""
        parts = [self._values(tensor) for tensor in tensors]
        rows, width, columns = len(parts[0]), sum(part.shape[1] for part in parts), sum(one.dims[1] for one in tensors)
        data = np.empty((rows, columns), parts[0].dtype)  # memory that is never written is never taken
        whole, end = data.reshape(-1)[: rows * width].reshape(rows, width), 0
        for part in parts:
            self.copies.append((whole[:, end : end + part.shape[1]], part))
            end += part.shape[1]
        return Weight(data, tensors[0].data_type)

    def _values(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        return self.made[tensor.name].data if tensor.name in self.made else _mapped(tensor, self.folder)


def _products(model: onnx.ModelProto) -> Iterator[_Product]:
    """Products by float weights, and by codes whose scales stand along their rows in blocks."""
    from onnx import TensorProto

    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    maker = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        if node.input[1] in stored:
            yield _Product(node, stored[node.input[1]])
            continue
        wide = maker.get(node.input[1])
        if wide is None or wide.op_type != "DequantizeLinear" or not all(name in stored for name in wide.input):
            continue
        block = {attribute.name: attribute.i for attribute in wide.attribute}.get("block_size", 0)
        codes, *scales = (stored[name] for name in wide.input)
        is_even = codes.dims[1] % 2 == 0  # otherwise two rows share a byte of 4 bits each
        if block and len(scales) == 1 and is_even and codes.data_type in (TensorProto.INT4, TensorProto.INT8):
            yield _Product(node, codes, scales[0], block)


def _mapped(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """A matrix of the weight file, codes of 4 bits as bytes of two."""
    from onnx import TensorProto

    if tensor.data_type != TensorProto.INT4:
        return mapped(tensor, folder)
    packed = TensorProto()
    packed.CopyFrom(tensor)
    packed.data_type, packed.dims[1] = TensorProto.UINT8, tensor.dims[1] // 2
    return mapped(packed, folder)


def _placeholder(name: str, weight: Weight) -> onnx.TensorProto:
    """What says in a graph that its values are handed over."""
    import onnx

    tensor = onnx.TensorProto(
        name=name, dims=weight.data.shape, data_type=weight.kind, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(weight.data.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def add_and_normalize(model: onnx.ModelProto) -> None:
    """A sum and its normalization become one node: a launch less, twice a layer.

    ONNX Runtime does so by itself for its own older operator only. Of float16 its CUDA kernel rounds the sum, as Add
    does, and adds squares up in float32, as RMSNormalization does; the CPU's does not round the sum.
    """
    from onnx import helper

    stored = {tensor.name for tensor in model.graph.initializer}
    added = {node.output[0]: node for node in model.graph.node if node.op_type == "Add" and not stored & {*node.input}}
    instead: dict[str, list[onnx.NodeProto]] = {}  # of a node, by its output
    for node in model.graph.node:
        sum_of = node.input[0] if node.op_type == "RMSNormalization" else ""
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if sum_of not in added or sum_of in instead or settings.get("axis", -1) != -1:
            continue
        instead[node.output[0]] = []
        instead[sum_of] = [
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [*added[sum_of].input, node.input[1]],
                [node.output[0], "", "", sum_of],
                domain=CONTRIB,
                epsilon=settings.get("epsilon", 1e-5),
            )
        ]
    if instead:
        replace_nodes(model, [new for node in model.graph.node for new in instead.get(node.output[0], [node])])
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def widen_gathered_codes(model: onnx.ModelProto) -> None:
    """int8 rows of an embedding become float by a cast and a product: CUDA has no kernel for int8 in blocks.

    It claims the DequantizeLinear, and fails when it runs.
    """
    from onnx import helper

    nodes: list[onnx.NodeProto] = []
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        codes = maker.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.op_type != "Gather":
            nodes.append(node)
            continue
        scales = maker[node.input[1]]
        width, blocks = sizes[codes.input[0]][1], sizes[scales.input[0]][1]
        name = node.name
        add_constants(model, **{f"{name}.blocks": [0, 0, blocks, width // blocks], f"{name}.row": [0, 0, width]})
        add_constants(model, **{f"{name}.last": [-1]})
        nodes += [
            helper.make_node("Cast", [node.input[0]], [f"{name}.wide"], to=dtypes[scales.input[0]]),
            helper.make_node("Reshape", [f"{name}.wide", f"{name}.blocks"], [f"{name}.codes"]),  # (B, T, blocks, size)
            helper.make_node("Unsqueeze", [node.input[1], f"{name}.last"], [f"{name}.scales"]),  # (B, T, blocks, 1)
            helper.make_node("Mul", [f"{name}.codes", f"{name}.scales"], [f"{name}.product"]),
            helper.make_node("Reshape", [f"{name}.product", f"{name}.row"], [node.output[0]]),
        ]
    replace_nodes(model, nodes)
