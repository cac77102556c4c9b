"""What batches gain on this machine: the same job with 1, 2, 4, 8 slots.

    python scripts/measure_throughput.py artifacts/demo/bundle --images 64 --new-tokens 64
    python scripts/measure_throughput.py artifacts/four-layers-int4 --max-image-side 256

Pictures of mixed sizes are made on the spot and answered with exactly as many tokens as asked for (the end is
forbidden). One round warms up; then batches take turns for `--rounds` rounds, so that a busy moment hits them alike.
Prints JSON: for each batch the median seconds of the whole job with smallest and largest, tokens and images a second,
the share of the time that the model waited for images, and where its time went.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.bench.measure import Endless
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.generation.model import Model, load_bundle
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

SIZES = ((640, 480), (480, 640), (1024, 768), (300, 300), (1600, 1200), (800, 200))
QUESTION = "Describe this image in one short sentence."


def write_pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:04}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(coarse).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def run(model: Model, paths: list[Path], new_tokens: int, slots: int, drafts: int) -> dict[str, Any]:
    endless: Any = Endless(model.bundle.model.eos)
    job = Job(
        model,
        [Request(str(path), user_message(QUESTION, [path]), new_tokens) for path in paths],
        Settings(model.bundle.fingerprint),
        JobOptions(slots=slots, drafts=drafts, schema=endless),
    )
    started = time.perf_counter()
    records = list(job.records())
    seconds = time.perf_counter() - started
    assert all(record.new_tokens == new_tokens for record in records)
    return {"seconds": seconds, "idle_s": job.idle_s} | asdict(job.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-image-side", type=int)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batch.split(",")]
    bundle = open_bundle(args.bundle)
    prompts = PromptBuilder(bundle, default_preprocess(bundle, max_side=args.max_image_side))
    model = load_bundle(bundle, prompts, threads=args.threads, backend="ort-cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), args.images)
        run(model, paths[:8], 4, max(batches), args.drafts)
        rounds = [
            {batch: run(model, paths, args.new_tokens, batch, args.drafts) for batch in batches}
            for _ in range(args.rounds)
        ]
    results = {batch: summary([one[batch] for one in rounds], args) for batch in batches}
    first = results[batches[0]]["seconds"][1]
    for result in results.values():
        result["speedup"] = round(first / result["seconds"][1], 2)
    setting = {"precision": bundle.precision, "layers": bundle.model.decoder.n_layers, "drafts": args.drafts}
    print(json.dumps(setting | {"images": args.images, "new_tokens": args.new_tokens, "batch": results}, indent=1))


def summary(runs: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    seconds = [one["seconds"] for one in runs]
    middle = statistics.median(seconds)
    stages = ("vision_ms", "prefill_ms", "decode_ms")
    return {
        "seconds": [round(value, 2) for value in (min(seconds), middle, max(seconds))],
        "tokens_per_s": round(args.images * args.new_tokens / middle, 2),
        "images_per_s": round(args.images / middle, 3),
        "idle_share": round(statistics.median(one["idle_s"] / one["seconds"] for one in runs), 4),
        **{name: round(statistics.median(one[name] for one in runs)) for name in stages},
    }


if __name__ == "__main__":
    main()
