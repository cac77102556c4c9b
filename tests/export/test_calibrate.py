"""What calibration decides from the inputs it has seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixtral_export.model.transformer import Linear
from pixtral_export.quantization.calibrate import InputGroup, noise, quantize_block, watch
from pixtral_export.quantization.formats import FP8, fake_quantize
from pixtral_export.quantization.recipes import Scheme

GROUPS = (InputGroup(("w_in",)),)


def samples() -> list[Tensor]:
    """Seven sequences (1, M, K) whose outliers have the same value in every token, below the largest."""
    random = torch.Generator().manual_seed(0)
    found = [torch.randn(1, 40, 32, generator=random) / 10 for _ in range(7)]
    for x in found:
        x[..., 3] = 108.0
    found[0][0, 5, 9] = 112.0  # that alone would make codes of 432, between the steps 416 and 448
    return found


def test_e4m3_inputs_have_the_scale_that_spares_outliers_and_clips_nothing() -> None:
    block, layer = nn.Module(), Linear(32, 16)
    block.add_module("w_in", layer)
    with torch.inference_mode():
        layer.weight.copy_(torch.randn(32, 16, generator=torch.Generator().manual_seed(1)))
        statistics, handles = watch(block, GROUPS, 7, ())
        for seen in samples():
            layer(seen)
        for handle in handles:
            handle.remove()
        schemes = {"w_in": Scheme(FP8.name, activation=FP8.name)}
        (outcome,) = quantize_block(
            block, GROUPS, schemes, statistics, "float32", "rtn", False, lambda: [layer(samples()[1])]
        )
        scale, x = outcome.quantized.input_scale, samples()[3][0]
        assert scale is not None and float(scale) * FP8.largest >= 112
        weight = outcome.quantized.dequantized()
        lost = [noise(x @ weight, fake_quantize(x, s, FP8) @ weight) for s in (scale, torch.tensor(112 / FP8.largest))]
    assert lost[0] < 0.3 * lost[1]
