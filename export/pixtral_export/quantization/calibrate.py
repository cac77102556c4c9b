"""Quantize the linear layers of one block with what its inputs looked like on samples.

The layers that read one tensor form an input group. Three things are decided from its samples: a scale for each input
channel that can be moved from activations into weights for free (into the norm or the linear layer that produced the
channel: SmoothQuant and AWQ), the one static scale of quantized activations, and the codes of int4 weights (GPTQ).

Shapes: K inputs and N outputs of a linear layer, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pixtral_export.model.transformer import Linear
from pixtral_export.quantization.formats import (
    FORMATS,
    FP4,
    FP8,
    Storable,
    expand_scales,
    fake_quantize,
    group_scales,
    round_to_nearest,
    stored_as,
    stored_as_e4m3,
)
from pixtral_export.quantization.gptq import Moments, factor, gptq
from pixtral_export.quantization.recipes import Scheme

SAMPLE_ROWS = 512  # inputs kept of each group, to try candidates on
SMOOTH_EXPONENTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
AWQ_EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEAST_SNR_DB = 15.0
"""Of a layer's output with quantized weights and activations. A worse one keeps its activations as they are."""


@dataclass(frozen=True)
class InputGroup:
    """Layers that read one tensor, and the norm or linear layer whose output channels it consists of."""

    layers: tuple[str, ...]
    source: str = ""


BLOCK_GROUPS = (  # later sources are rescaled first, so that a source is final when its own group is quantized
    InputGroup(("feed_forward.w2",), "feed_forward.w3"),
    InputGroup(("attention.wo",), "attention.wv"),
    InputGroup(("feed_forward.w1", "feed_forward.w3"), "ffn_norm"),
    InputGroup(("attention.wq", "attention.wk", "attention.wv"), "attention_norm"),
)
ADAPTER_GROUPS = (InputGroup(("w_in",)), InputGroup(("w_out",)))


@dataclass(frozen=True)
class Quantized:
    """A linear layer's codes (K, N) and scales, and the static scale of its input where that is quantized."""

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    unit: Tensor | None = None  # of E4M3 scales
    input_scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        return self.codes * expand_scales(self.scales, len(self.codes))


class InputStatistics:
    """What is kept of a group's input while the samples pass: range, mean, some rows, and moments for GPTQ."""

    def __init__(self, width: int, sequences: int, moments: bool) -> None:
        self.largest = torch.zeros(width)
        self.sum = torch.zeros(width)
        self.rows: list[Tensor] = []
        self.moments = Moments(width) if moments else None
        self._rows_each = max(1, SAMPLE_ROWS // sequences)

    def add(self, x: Tensor) -> None:
        """x (1, M, K), one sequence."""
        x = x.flatten(0, 1)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.sum += x.abs().sum(0)
        count = min(self._rows_each, len(x))
        self.rows.append(x[torch.linspace(0, len(x) - 1, count).round().long()].clone())
        if self.moments is not None:
            self.moments.add(x)

    def divide(self, scale: Tensor) -> None:
        """The input's channels were divided by `scale` (K,)."""
        self.largest, self.sum = self.largest / scale, self.sum / scale
        self.rows = [rows / scale for rows in self.rows]


def watch(
    block: nn.Module, groups: Sequence[InputGroup], sequences: int, moments: Sequence[str]
) -> tuple[dict[str, InputStatistics], list[torch.utils.hooks.RemovableHandle]]:
    """Collect statistics of each group's input, by its first layer, until the handles are removed.

    `moments` names the layers whose inputs' second moments are wanted.
    """
    statistics, handles = {}, []
    for group in groups:
        layer = _linear(block, group.layers[0])
        wanted = not set(moments).isdisjoint(group.layers)
        seen = statistics[group.layers[0]] = InputStatistics(len(layer.weight), sequences, wanted)
        handles.append(layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.add(inputs[0])))
    return statistics, handles


def quantize_block(
    block: nn.Module,
    groups: Sequence[InputGroup],
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, InputStatistics],
    dtype: str,
    method: str,
    smooth: bool,
) -> Iterator[tuple[str, Quantized, float]]:
    """Quantize the layers that `schemes` names. Yields name, result and the output's SNR in dB.

    Afterwards the block computes what the quantized one will: weights hold their dequantized values, inputs are rounded
    where a scheme says so. Scales that move from activations to weights change norms and sources too.
    """
    if smooth or method == "awq":
        for group in groups:
            members = [(_linear(block, name), schemes[name]) for name in group.layers if name in schemes]
            if group.source and len(members) == len(group.layers):
                _smooth(block, group, members, statistics[group.layers[0]], dtype, smooth)
    for group in groups:
        seen = statistics[group.layers[0]]
        factors = None if seen.moments is None else factor(seen.moments)
        for name in group.layers:
            if name in schemes:
                yield name, *_quantize_layer(_linear(block, name), schemes[name], seen, factors, dtype)


def _quantize_layer(
    layer: Linear, scheme: Scheme, seen: InputStatistics, factors: list[Tensor] | None, dtype: str
) -> tuple[Quantized, float]:
    """Quantize a layer in place. Returns what to store and the SNR of its output on the sampled rows."""
    rows = torch.cat(seen.rows)
    expected = rows @ layer.weight
    if scheme.activation is None:
        quantized = quantize_weight(layer.weight, scheme, dtype, factors)
        layer.weight.copy_(quantized.dequantized())
        return quantized, snr(expected, rows @ layer.weight)
    format = FORMATS[scheme.activation]
    scale = stored_as("float32")(seen.largest.max() / format.largest)
    quantized = replace(quantize_weight(layer.weight, scheme, "float32"), input_scale=scale)
    weight = quantized.dequantized()
    snr_db = snr(expected, fake_quantize(rows, scale, format) @ weight)
    if snr_db < LEAST_SNR_DB:
        return _quantize_layer(layer, replace(scheme, activation=None), seen, None, dtype)
    layer.weight.copy_(weight)
    layer.register_forward_pre_hook(lambda _, inputs: (fake_quantize(inputs[0], scale, format),))
    return quantized, snr_db


def quantize_weight(weight: Tensor, scheme: Scheme, dtype: str, factors: list[Tensor] | None = None) -> Quantized:
    """Codes and scales of a weight (K, N): by GPTQ where `factors` of the input's moments are given, else rounded."""
    format = FORMATS[scheme.weight]
    unit = e4m3_unit(weight.abs().amax(), dtype) if format is FP4 else None
    storable: Storable = stored_as(dtype) if unit is None else stored_as_e4m3(unit)
    if factors is not None and scheme.group is not None:
        return Quantized(scheme, *gptq(weight, factors, format, scheme.group, storable), unit)
    scales = group_scales(weight, format, scheme.group, storable)
    return Quantized(scheme, round_to_nearest(weight, scales, format), scales, unit)


def e4m3_unit(largest: Tensor, dtype: str) -> Tensor:
    """The float scale of a whole tensor: the largest group's scale becomes E4M3's largest value."""
    return stored_as(dtype)(largest / (FP4.largest * FP8.largest))


def snr(expected: Tensor, seen: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    noise = (expected - seen).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(expected.square().sum().clamp(min=1e-30) / noise))


def _smooth(
    block: nn.Module,
    group: InputGroup,
    members: Sequence[tuple[Linear, Scheme]],
    seen: InputStatistics,
    dtype: str,
    smooth: bool,
) -> None:
    """Find the channel scales under which the group's quantized outputs are nearest, and move them."""
    rows = torch.cat(seen.rows)
    expected = [rows @ layer.weight for layer, _ in members]
    weight_largest = torch.stack([layer.weight.abs().amax(1) for layer, _ in members]).amax(0).clamp(min=1e-5)
    activity = (seen.largest if smooth else seen.sum).clamp(min=1e-5)
    best, least = torch.ones_like(activity), float("inf")
    for exponent in SMOOTH_EXPONENTS if smooth else AWQ_EXPONENTS:
        scale = activity**exponent
        if smooth and exponent:
            scale = scale / weight_largest ** (1 - exponent)
        scale = _shared(scale / (scale.max() * scale.min()).sqrt(), block, group).clamp(1e-4, 1e4)
        error = 0.0
        for (layer, scheme), output in zip(members, expected, strict=True):
            x = rows / scale
            if scheme.activation is not None:
                format = FORMATS[scheme.activation]
                x = fake_quantize(x, (seen.largest / scale).max() / format.largest, format)
            error -= snr(output, x @ quantize_weight(layer.weight * scale[:, None], scheme, dtype).dequantized())
        if error < least:
            best, least = scale, error
    for layer, _ in members:
        layer.weight.mul_(best[:, None])
    source = block.get_submodule(group.source).weight
    assert isinstance(source, Tensor)
    source.div_(best if len(best) == source.shape[-1] else _one_of_shared(best, block))
    seen.divide(best)


def _heads(block: nn.Module, width: int) -> tuple[int, int, int]:
    """Key/value heads, query heads that share one, head dim."""
    kv_width = _linear(block, "attention.wv").weight.shape[1]
    head_dim = block.get_submodule("attention").head_dim
    assert isinstance(head_dim, int)
    return kv_width // head_dim, width // kv_width, head_dim


def _shared(scale: Tensor, block: nn.Module, group: InputGroup) -> Tensor:
    """wo's inputs of all query heads that share a value head get one scale, because wv has only one place for it."""
    if group.source != "attention.wv":
        return scale
    heads = scale.view(_heads(block, len(scale)))
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _one_of_shared(scale: Tensor, block: nn.Module) -> Tensor:
    return scale.view(_heads(block, len(scale)))[:, 0].reshape(-1)


def _linear(block: nn.Module, name: str) -> Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer
