"""The least times of Pixtral-12B on devices, by their published bandwidths and rates: the tables of docs/roofline.md.

    python scripts/predict_ceilings.py            # print the tables
    python scripts/predict_ceilings.py --update   # write them into docs/roofline.md

Predictions: nothing here was measured. The work is one picture of 1024 × 1024 pixels with a short question, the weights
those that `pixtral export` would write. A recipe is left out where the device lacks its type or the memory for it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from make_synthetic_checkpoint import pixtral_12b
from pixtral_export.plan import DEFAULT_CONTEXT
from pixtral_export.quantization.recipes import EMBEDDING, Stored, make_recipe
from pixtral_export.weight_names import DECODER_ROPE, VISION_ROPE
from pixtral_export.weights.plan import plan_weights, weight_file_bytes
from pixtral_runtime.bench.roofline import Ceiling, Cost, Sizes, ceiling, stage_costs
from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES, KnownDevice, PeakRates
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.bundle.manifest import Limits
from pixtral_runtime.bundle.spec import kv_cache_bytes_per_token

PAGE = Path(__file__).parents[1] / "docs" / "roofline.md"
DTYPE = "float16"
PRECISIONS = ("float16", "int8", "fp8", "int4")
NAMES = ("orin-nx-16", "agx-orin-64", "thor", "dgx-spark", "l4", "rtx-4090", "a100-80", "h100", "h200")
SIDE = 1024  # pixels: 4,096 patches, 64 line ends
PROMPT_TOKENS = 4096 + 64 + 64  # and a question
CONTEXT_ROWS = PROMPT_TOKENS + 128  # at the end of an answer
BATCHES = (1, 8)
BEGIN, END = "<!-- predict_ceilings.py -->\n", "<!-- end -->\n"


def graph_of(item: Stored) -> str | None:
    """Which graph reads a tensor of the weight file; None for rotary tables."""
    if item.name in (*VISION_ROPE, *DECODER_ROPE):
        return None
    if item.name.startswith("vision"):
        return "vision"
    return "embed" if item.name.startswith(EMBEDDING) else "decoder"


def planned(precision: str) -> tuple[Sizes, Footprint]:
    """What an export of Pixtral-12B would weigh."""
    model, limits = pixtral_12b(), Limits(DEFAULT_CONTEXT, SIDE)
    stored = plan_weights(model, DTYPE, limits, make_recipe(precision, DTYPE))
    weights = dict.fromkeys(("vision", "embed", "decoder"), 0)
    for item in stored:
        if graph := graph_of(item):
            weights[graph] += item.nbytes
    per_token = kv_cache_bytes_per_token(model, DTYPE)
    footprint = Footprint(model, DTYPE, precision, limits, {precision: weight_file_bytes(stored)}, per_token)
    return Sizes(model, weights, per_token, 2), footprint


def predicted(cost: Cost, peak: PeakRates, precision: str) -> Ceiling:
    """Weight-only recipes multiply in float16, attention always does."""
    rate = {"int8": peak.int8, "fp8": peak.fp8}.get(precision, peak.float16)
    return ceiling(cost, peak.bandwidth_bytes_per_s, rate, peak.float16)


def row(device: KnownDevice, peak: PeakRates, precision: str, sizes: Sizes, footprint: Footprint) -> str:
    """A line of the table: images and tokens at best; "-" where the batch does not fit."""

    def costs(batch: int) -> dict[str, Cost]:
        return stage_costs(sizes, image_side=SIDE, prompt_tokens=PROMPT_TOKENS, context_rows=CONTEXT_ROWS, batch=batch)

    vision, prefill = (predicted(costs(1)[stage], peak, precision) for stage in ("vision", "prefill"))
    decode = [
        f"{batch / predicted(costs(batch)['decode'], peak, precision).seconds:,.1f}"
        if footprint.fits(device, CONTEXT_ROWS, batch)
        else "-"
        for batch in BATCHES
    ]
    rate = f"{PROMPT_TOKENS / prefill.seconds:,.0f} ({prefill.bound_by})"
    cells = (device.name, precision, f"{1e3 * vision.seconds:,.1f} ({vision.bound_by})", rate, *decode)
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """Both tables in Markdown: what the devices have, and the ceilings."""
    lines = [
        "| device | memory bandwidth, GB/s | float16, TFLOPS | int8, TOPS | fp8, TFLOPS |",
        "| --- | --- | --- | --- | --- |",
    ]
    peaks = {name: peak for name in NAMES if (peak := KNOWN_DEVICES[name].peak)}
    for name, peak in peaks.items():
        rates = (peak.bandwidth_bytes_per_s / 1e9, peak.float16 / 1e12, peak.int8 / 1e12, peak.fp8 / 1e12)
        lines.append(f"| {name} | {' | '.join(f'{rate:,.5g}' if rate else '-' for rate in rates)} |")
    lines += [
        "",
        "| device | precision | vision, ms an image | prefill, tokens/s | decode, tokens/s | decode of 8, tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plans = {precision: planned(precision) for precision in PRECISIONS}
    lines += [
        row(KNOWN_DEVICES[name], peak, precision, sizes, footprint)
        for name, peak in peaks.items()
        for precision, (sizes, footprint) in plans.items()
        if footprint.supported(KNOWN_DEVICES[name]) and footprint.fits(KNOWN_DEVICES[name], CONTEXT_ROWS, 1)
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables into docs/roofline.md")
    if parser.parse_args().update:
        text = PAGE.read_text(encoding="utf-8")
        between = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)
        PAGE.write_text(between.sub(lambda _: tables(), text), encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
