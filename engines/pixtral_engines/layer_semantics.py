"""What each layer of a TensorRT network means, in NumPy.

Semantics are those of NVIDIA's operator pages (docs.nvidia.com/deeplearning/tensorrt, "TensorRT Operators"). Only what
the graphs of a bundle turn into is known; any other layer or mode raises UnknownLayer. To teach another: a function of
the form `Evaluate`, and a line in `LAYERS`.

Shapes: B batch, N query heads, K key/value heads, T tokens, C cache rows, E head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pixtral_engines.arrays import weights_array
from pixtral_engines.attention_semantics import attention
from pixtral_engines.tensors import Evaluate, Tensor, UnknownLayer, wide
from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import InputError

LIMITS = {"INT8": (-128, 127), "INT4": (-8, 7), "FP8": (-448, 448), "FP4": (-6, 6)}
"""What Quantize clamps to."""


# Constants and types


def _constant(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    return weights_array(layer.weights).reshape(tuple(layer.shape))


def _same(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Cast, and the output side of an attention: the new type is the output's."""
    return inputs[0]


# Shapes


def _shape(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    return np.array(inputs[0].shape, np.int64)


def _shuffle(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Transpose, reshape, transpose. A 0 in the new shape keeps a dimension where it is a placeholder."""
    x = inputs[0].transpose(tuple(layer.first_transpose)[: inputs[0].ndim])
    shape = inputs[1] if len(inputs) > 1 else layer.reshape_dims
    if shape is not None:
        keeps = layer.zero_is_placeholder
        x = x.reshape([x.shape[axis] if keeps and n == 0 else int(n) for axis, n in enumerate(shape)])
    return x.transpose(tuple(layer.second_transpose)[: x.ndim])


def _squeeze(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Drop the named axes, or every axis of size 1 where none are named."""
    return np.squeeze(inputs[0], tuple(inputs[1]) if len(inputs) > 1 else None)


def _unsqueeze(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    return np.expand_dims(inputs[0], tuple(inputs[1]))


def _concatenation(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    return np.concatenate(inputs, layer.axis)


def _slice(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Start, size and stride of every axis or of those named, each an input or an attribute. A stride of 0 repeats."""
    if layer.mode.name != "STRICT_BOUNDS":
        raise UnknownLayer(layer, f"the slice mode {layer.mode.name}")
    given = [*inputs[1:], None, None, None]
    start, size, stride = (
        attribute if value is None else value
        for value, attribute in zip(given[:3], (layer.start, layer.shape, layer.stride), strict=True)
    )
    places = [np.arange(n) for n in inputs[0].shape]
    axes = range(inputs[0].ndim) if layer.axes is None else layer.axes
    for axis, first, n, step in zip(axes, start, size, stride, strict=True):
        places[axis] = first + step * np.arange(n)
        _check_indices(layer, places[axis], inputs[0].shape[axis])
    return np.asarray(inputs[0][np.ix_(*places)])


def _fill(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """alpha + beta · index, from the inputs shape, alpha and beta."""
    if layer.operation.name != "LINSPACE" or len(inputs) != 3:
        raise UnknownLayer(layer, f"the fill {layer.operation.name} of {len(inputs)} inputs")
    shape, alpha, beta = inputs
    return np.asarray(alpha + np.tensordot(beta, np.indices(tuple(shape)), 1))


def _check_indices(layer: Any, indices: Array, size: int) -> None:
    """What TensorRT leaves undefined is an error here."""
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise InputError(
            f"layer '{layer.name}' reads or writes rows {indices.min()} to {indices.max()} of {size}",
            "feed indices within the tensor",
        )


def _gather(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    if layer.mode.name != "DEFAULT" or layer.num_elementwise_dims:
        raise UnknownLayer(layer, f"the gather mode {layer.mode.name}, {layer.num_elementwise_dims} elementwise,")
    _check_indices(layer, inputs[1], inputs[0].shape[layer.axis])
    return np.asarray(np.take(inputs[0], inputs[1], layer.axis))


def _scatter(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Copy of the data with updates written along an axis, as ONNX ScatterElements."""
    if layer.mode.name != "ELEMENT":
        raise UnknownLayer(layer, f"the scatter mode {layer.mode.name}")
    data, indices, updates = inputs
    _check_indices(layer, indices, data.shape[layer.axis])
    copy = data.copy()
    np.put_along_axis(copy, indices, updates, layer.axis)
    return copy


# Arithmetic

_erf: Any = np.frompyfunc(math.erf, 1, 1)
ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "DIV": np.divide, "FLOOR_DIV": np.floor_divide,
    "POW": np.power, "MIN": np.minimum, "MAX": np.maximum, "AND": np.logical_and, "OR": np.logical_or,
    "XOR": np.logical_xor, "EQUAL": np.equal, "GREATER": np.greater, "LESS": np.less,
}  # fmt: skip
UNARY: dict[str, Callable[[Array], Array]] = {
    "ABS": np.abs, "CEIL": np.ceil, "COS": np.cos, "EXP": np.exp, "FLOOR": np.floor, "LOG": np.log, "NEG": np.negative,
    "NOT": np.logical_not, "RECIP": np.reciprocal, "ROUND": np.rint, "SIN": np.sin, "SQRT": np.sqrt,
    "ERF": lambda x: np.asarray(_erf(x), np.float32),
}  # fmt: skip
ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "RELU": lambda x: np.maximum(x, 0),
    "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "GELU_ERF": lambda x: 0.5 * x * (1 + UNARY["ERF"](math.sqrt(0.5) * x)),
}
REDUCE: dict[str, Callable[..., Array]] = {
    "SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean,
}  # fmt: skip


def _operation(table: dict[str, Any], layer: Any, operation: Any) -> Any:
    if operation.name not in table:
        raise UnknownLayer(layer, f"the operation {operation.name}")
    return table[operation.name]


def _elementwise(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    result: Array = _operation(ELEMENTWISE, layer, layer.op)(*map(wide, inputs))
    return result


def _unary(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    result: Array = _operation(UNARY, layer, layer.op)(wide(inputs[0]))
    return result


def _activation(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    result: Array = _operation(ACTIVATION, layer, layer.type)(wide(inputs[0]))
    return result


def _reduce(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    axes = tuple(axis for axis in range(inputs[0].ndim) if layer.axes >> axis & 1)
    result: Array = _operation(REDUCE, layer, layer.op)(wide(inputs[0]), axis=axes, keepdims=layer.keep_dims)
    return result


def _softmax(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Over the one axis whose bit is set."""
    axis, x = layer.axes.bit_length() - 1, wide(inputs[0])
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def _select(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    condition, yes, no = inputs
    return np.where(condition, yes, no)


def _matrix_multiply(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    def operand(x: Array, operation: str) -> Array:
        if operation == "VECTOR":
            raise UnknownLayer(layer, "the operation VECTOR")
        return wide(x.swapaxes(-1, -2) if operation == "TRANSPOSE" else x)

    product: Array = operand(inputs[0], layer.op0.name) @ operand(inputs[1], layer.op1.name)
    return product


def _convolution(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Two-dimensional correlation of (B, C, H, W) with kernels (M, C, R, S) and an optional bias (M,)."""
    plain = (tuple(layer.dilation_nd), layer.num_groups, tuple(layer.padding_nd), len(inputs), len(layer.stride_nd))
    explicit = layer.padding_mode.name.startswith("EXPLICIT") and tuple(layer.post_padding) == (0, 0)
    if plain != ((1, 1), 1, (0, 0), 1, 2) or not explicit:
        raise UnknownLayer(layer, "the dilation, groups or padding")
    x, (rows, columns), (height, width) = wide(inputs[0]), layer.stride_nd, layer.kernel_size_nd
    kernel = wide(weights_array(layer.kernel)).reshape(layer.num_output_maps, x.shape[1], height, width)
    sliding = np.lib.stride_tricks.sliding_window_view
    windows = sliding(sliding(x, height, 2), width, 3)[:, :, ::rows, ::columns]  # (B, C, h, w, R, S)
    y = np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3)))  # (B, h, w, M)
    bias = weights_array(layer.bias)
    return (y + wide(bias) if bias.size else y).transpose(0, 3, 1, 2)


# Numbers of few bits


def _in_blocks(x: Array, scale: Array, axis: int) -> tuple[Array, Array]:
    """x with every axis split into scales and values of one scale, and the scales to be broadcast over it.

    One scale serves all of x; a list of scales one slice each along `axis`; scales of x's rank a block each, whose
    sizes TensorRT takes from the shapes too.
    """
    shape: tuple[int, ...] = scale.shape
    if scale.size == 1:
        shape = (1,) * x.ndim
    elif scale.ndim < x.ndim:
        shape = tuple(scale.size if n == axis else 1 for n in range(x.ndim))
    split = [n for blocks, size in zip(shape, x.shape, strict=True) for n in (blocks, size // blocks)]
    return wide(x).reshape(split), wide(scale).reshape([n for blocks in shape for n in (blocks, 1)])


def _quantize(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """clamp(round(x / scale) + zero), ties to even; a type with a fraction rounds to its own steps instead."""
    x, scale = _in_blocks(inputs[0], inputs[1], layer.axis)
    codes = x / scale
    codes = np.rint(codes) if output.dtype.startswith("INT") else codes
    codes = codes if len(inputs) < 3 else codes + wide(inputs[2])
    return np.clip(codes, *LIMITS[output.dtype]).reshape(inputs[0].shape)


def _dequantize(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """(codes - zero) · scale."""
    codes, scale = _in_blocks(inputs[0], inputs[1], layer.axis)
    codes = codes if len(inputs) < 3 else codes - wide(inputs[2])
    return (codes * scale).reshape(inputs[0].shape)


# Transformers


def _rotary_embedding(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Rotate pairs of (B, N, T, E) by the angles whose cosine and sine are (positions, E/2), or (B, T, E/2).

    Pairs are neighbours where interleaved, else the halves' first, second, … elements.
    """
    x, cos, sin = map(wide, inputs[:3])
    if len(inputs) > 3 and inputs[3] is not None:
        _check_indices(layer, inputs[3], len(cos))
        cos, sin = cos[inputs[3]], sin[inputs[3]]
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, E/2)
    width = layer.rotary_embedding_dim or x.shape[-1]
    turned = x.copy()
    pairs = (slice(0, width, 2), slice(1, width, 2))
    first, second = pairs if layer.interleaved else (slice(0, width // 2), slice(width // 2, width))
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def _kv_cache_update(layer: Any, inputs: Sequence[Array], output: Tensor) -> Array:
    """Copy of a cache (B, K, C, E) with (B, K, T, E) written from row index (B,) on. TensorRT writes in place."""
    if (layer.cache_mode.name, layer.update_form.name) != ("LINEAR", "PADDED_BHND"):
        raise UnknownLayer(layer, f"the cache mode {layer.cache_mode.name} {layer.update_form.name}")
    cache, update, index = inputs[:3]
    rows = update.shape[2]
    _check_indices(layer, np.stack([index, index + rows - 1]), cache.shape[2])
    copy = cache.copy()
    for slot, start in enumerate(index):
        copy[slot, :, start : start + rows] = update[slot]
    return copy


def _top_k(layer: Any, inputs: Sequence[Array], output: Tensor) -> tuple[Array, Array]:
    """The largest values along an axis and where they stand, of equal ones the first."""
    axes = [axis for axis in range(inputs[0].ndim) if layer.axes >> axis & 1]
    if layer.op.name != "MAX" or len(axes) != 1:
        raise UnknownLayer(layer, f"top-k {layer.op.name} along axes {axes}")
    count = layer.k if len(inputs) == 1 or inputs[1] is None else int(inputs[1])
    places = np.argsort(-wide(inputs[0]), axes[0], kind="stable").take(range(count), axes[0])
    return np.take_along_axis(inputs[0], places, axes[0]), places


LAYERS: dict[str, tuple[str, Evaluate]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _same),
    "CAST": ("ICastLayer", _same),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CONSTANT": ("IConstantLayer", _constant),
    "CONVOLUTION": ("IConvolutionLayer", _convolution),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "FILL": ("IFillLayer", _fill),
    "GATHER": ("IGatherLayer", _gather),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "SCATTER": ("IScatterLayer", _scatter),
    "SELECT": ("ISelectLayer", _select),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "SQUEEZE": ("ISqueezeLayer", _squeeze),
    "TOPK": ("ITopKLayer", _top_k),
    "UNARY": ("IUnaryLayer", _unary),
    "UNSQUEEZE": ("IUnsqueezeLayer", _unsqueeze),
}
"""Each layer type's class in the bindings and its meaning."""
