"""Quantize the linear layers of one block with what its inputs looked like on samples.

The layers that read one tensor form an input group. Three things are decided from its samples: a scale for each input
channel that can be moved from activations into weights for free (into the norm or the linear layer that produced the
channel: SmoothQuant and AWQ), the one static scale of quantized activations, and codes by GPTQ, but of int8.
Every seventh sample only judges: where it says so, GPTQ gives way to rounding, and rounded inputs to whole ones.

Shapes: K inputs and N outputs of a linear layer, M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pixtral_export.model.transformer import Linear
from pixtral_export.quantization.formats import (
    FORMATS,
    FP4,
    FP8,
    Format,
    Storable,
    expand_scales,
    fake_quantize,
    group_scales,
    round_to_nearest,
    stored_as,
    stored_as_e4m3,
)
from pixtral_export.quantization.gptq import Factor, Moments, factor, gptq
from pixtral_export.quantization.recipes import Scheme

SAMPLE_ROWS = 512  # inputs kept of each group to try candidates on, and as many to judge them by
HOLD_OUT_EVERY = 7  # samples
SMOOTH_EXPONENTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
AWQ_EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEAST_SNR_DB = 15.0
"""Of a layer's output with quantized weights and activations. A worse one keeps its activations as they are."""
MOST_COST, MOST_LOST_DB = 2e-4, 3.0
"""The share of noise in a block's output from rounding a group's inputs, and what one scale for all tokens takes from
the layer's signal-to-noise ratio. With more of both a group keeps its inputs."""


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
ADAPTER_GROUPS = (InputGroup(("merging_layer",)), InputGroup(("w_in",)), InputGroup(("w_out",)))


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


def judges(sequences: int) -> range:
    """Numbers of the samples that only judge; a single one judges itself."""
    return range(1, sequences, HOLD_OUT_EVERY) if sequences > 1 else range(sequences)


class InputStatistics:
    """What is kept of a group's input while the samples pass: range, mean, some rows, and moments for GPTQ.

    Every token counts alike in mean and moments, as it does to the norm behind the layer: a first token with a thousand
    times the energy of the others would decide alone. Rows of samples that are held out only judge. A single sample
    judges itself.
    """

    def __init__(self, width: int, sequences: int, moments: bool) -> None:
        self.largest = torch.zeros(width)
        self.sum = torch.zeros(width)
        self.rows: list[Tensor] = []
        self.held_out: list[Tensor] = []
        self.moments = Moments(width) if moments else None
        self._seen, self._judges = 0, judges(sequences)
        self._rows_each = max(1, SAMPLE_ROWS // max(1, sequences - len(self._judges)))
        self._held_out_each = max(1, SAMPLE_ROWS // max(1, len(self._judges)))

    def add(self, x: Tensor) -> None:
        """x (1, M, K), one sequence."""
        x = x.flatten(0, 1)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        alike = x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
        self.sum += alike.abs().sum(0)
        is_judge = self._seen in self._judges
        self._seen += 1
        if is_judge:
            self.held_out.append(_spread(x, self._held_out_each))
        if not is_judge or self._judges == range(1):
            self.rows.append(_spread(x, self._rows_each))
            if self.moments is not None:
                self.moments.add(alike)

    def divide(self, scale: Tensor) -> None:
        """The input's channels were divided by `scale` (K,)."""
        self.largest, self.sum = self.largest / scale, self.sum / scale
        self.rows = [rows / scale for rows in self.rows]
        self.held_out = [rows / scale for rows in self.held_out]


def _spread(x: Tensor, count: int) -> Tensor:
    """A copy of so many rows of x (M, K) at even distances."""
    return x[torch.linspace(0, len(x) - 1, min(count, len(x))).round().long()].clone()


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


@dataclass(frozen=True)
class Outcome:
    """A quantized layer, and the signal-to-noise ratio of its output on samples held out."""

    name: str
    quantized: Quantized
    snr_db: float
    rounded: tuple[float, float] | None = None  # SNR in dB by GPTQ and by rounding, where that did better


def quantize_block(
    block: nn.Module,
    groups: Sequence[InputGroup],
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, InputStatistics],
    dtype: str,
    method: str,
    smooth: bool,
    judge: Callable[[], list[Tensor]],
) -> Iterator[Outcome]:
    """Quantize the layers that `schemes` names. `judge` gives the block's outputs (1, M, D) on samples held out.

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
        members = [(_linear(block, name), schemes[name]) for name in group.layers if name in schemes]
        names = [name for name in group.layers if name in schemes]
        if all(scheme.activation is None for _, scheme in members):
            for name, (layer, scheme) in zip(names, members, strict=True):
                yield _quantize_weight(name, layer, scheme, seen, factors, dtype)
        else:
            yield from _quantize_with_inputs(names, members, seen, factors, dtype, judge)


def _quantize_with_inputs(
    names: Sequence[str],
    members: Sequence[tuple[Linear, Scheme]],
    seen: InputStatistics,
    factors: list[Factor] | None,
    dtype: str,
    judge: Callable[[], list[Tensor]],
) -> Iterator[Outcome]:
    """Quantize the layers of a group whose one input is to be rounded, unless that costs too much.

    What a group costs in answers is what its noise is to the residual stream behind the block: the KL divergence that
    rounding one group alone caused was 1 to 3 times that share in nearly every group of a trained decoder.
    """
    weights = [layer.weight.clone() for layer, _ in members]
    rows, outcomes, lost_db = torch.cat(seen.held_out), [], 0.0
    format = FORMATS[next(scheme.activation for _, scheme in members if scheme.activation)]  # one recipe, one format
    scale = stored_as("float32")(seen.largest.max() / format.largest)
    for name, (layer, scheme) in zip(names, members, strict=True):
        expected = rows @ layer.weight
        outcome = _quantize_weight(
            name, layer, scheme, seen, factors, dtype if scheme.activation is None else "float32"
        )
        if scheme.activation is not None:
            snr_db = snr(expected, fake_quantize(rows, scale, format) @ layer.weight)
            own_scales = stored_as("float32")(rows.abs().amax(1, keepdim=True) / format.largest)
            lost_db = max(lost_db, snr(expected, fake_quantize(rows, own_scales, format) @ layer.weight) - snr_db)
            outcome = replace(outcome, quantized=replace(outcome.quantized, input_scale=scale), snr_db=snr_db)
        outcomes.append(outcome)
    exact, handles = judge(), []
    for layer, scheme in members:
        if scheme.activation is not None:
            handles.append(layer.register_forward_pre_hook(_rounds_input(scale, format)))
    cost = noise(torch.cat(exact, 1)[0], torch.cat(judge(), 1)[0])
    is_costly = cost > MOST_COST and lost_db > MOST_LOST_DB
    is_too_much = is_costly or min(outcome.snr_db for outcome in outcomes) < LEAST_SNR_DB
    if is_too_much:
        for handle in handles:
            handle.remove()
    for outcome, (layer, scheme), weight in zip(outcomes, members, weights, strict=True):
        if is_too_much and outcome.quantized.input_scale is not None:
            layer.weight.copy_(weight)
            alone = _quantize_weight(outcome.name, layer, replace(scheme, activation=None), seen, factors, dtype)
            yield replace(alone, snr_db=outcome.snr_db)
        else:
            yield outcome


def _rounds_input(scale: Tensor, format: Format) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, inputs: (fake_quantize(inputs[0], scale, format),)


def _quantize_weight(
    name: str, layer: Linear, scheme: Scheme, seen: InputStatistics, factors: list[Factor] | None, dtype: str
) -> Outcome:
    """Quantize a layer's weight: by GPTQ where there are factors, unless rounding does better for whole inputs."""
    rows = torch.cat(seen.held_out)
    expected = rows @ layer.weight

    def quantized(by: list[Factor] | None) -> Outcome:
        found = quantize_weight(layer.weight, scheme, dtype, by)
        return Outcome(name, found, snr(expected, rows @ found.dequantized()))

    if factors is None or not scheme.is_coarse:
        outcome = quantized(None)
    else:
        rounding_db = quantized(None).snr_db  # its codes are made again where they are wanted: one set in memory
        outcome = quantized(factors)
        if outcome.snr_db < rounding_db:
            outcome = replace(quantized(None), rounded=(outcome.snr_db, rounding_db))
    layer.weight.copy_(outcome.quantized.dequantized())
    return outcome


def quantize_weight(weight: Tensor, scheme: Scheme, dtype: str, factors: list[Factor] | None = None) -> Quantized:
    """Codes and scales of a weight (K, N): by GPTQ where `factors` of the input's moments are given, else rounded."""
    format = FORMATS[scheme.weight]
    unit = e4m3_unit(weight.abs().amax(), dtype) if format is FP4 else None
    storable: Storable = stored_as(dtype) if unit is None else stored_as_e4m3(unit)
    if factors is not None and scheme.is_coarse:
        return Quantized(scheme, *gptq(weight, factors, format, scheme.group, storable), unit)
    scales = group_scales(weight, format, scheme.group, storable)
    return Quantized(scheme, round_to_nearest(weight, scales, format), scales, unit)


def e4m3_unit(largest: Tensor, dtype: str) -> Tensor:
    """The float scale of a whole tensor: the largest group's scale becomes E4M3's largest value."""
    return stored_as(dtype)(largest / (FP4.largest * FP8.largest))


def noise(expected: Tensor, seen: Tensor) -> float:
    """The mean share of noise in outputs (M, N), each row's measured by its own signal.

    A first token with a thousand times the others' energy would hide that nothing is left of them.
    """
    shares = (expected - seen).square().sum(-1) / expected.square().sum(-1).clamp(min=1e-30)
    return float(shares.double().mean().clamp(min=1e-30))


def snr(expected: Tensor, seen: Tensor) -> float:
    """Signal-to-noise ratio in dB, of rows as `noise` weighs them."""
    return -10 * math.log10(noise(expected, seen))


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
