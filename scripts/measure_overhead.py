"""What the runtime adds to a decode step, at Pixtral-12B's layer size.

Times the same decoder graph twice in turn: inside `Scheduler.run` (embed, cache binding, sampling, streaming) and
as the bare `session.run` with everything bound beforehand. Prints JSON: both medians and quartiles, and the overhead
in percent.

    python scripts/measure_overhead.py --layers 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from make_synthetic_checkpoint import params_json, pixtral_12b, write_tokenizer, write_weights
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime import load
from pixtral_runtime.backends.ort_caches import OrtCache
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message

PROMPT = "Describe this image in one short sentence."


def stream_steps_ms(model: Model, count: int) -> list[float]:
    """Wall time between tokens of `Scheduler.run`."""
    prompt = model.prompts.build(user_message(PROMPT))
    stamps = []
    for _ in Scheduler(model.bundle, model.runner).run(Generation(prompt, count + 1)):
        stamps.append(time.perf_counter())
    return [(after - before) * 1e3 for before, after in pairwise(stamps)]


def bare_steps_ms(model: Model, count: int) -> list[float]:
    """Wall time of `run_with_iobinding` on the decoder alone, inputs and outputs bound once."""
    import onnxruntime as ort  # after pixtral, which tells it not to report its use

    decoder = model.runner.sessions.decoder
    session: ort.InferenceSession = decoder._session  # type: ignore[attr-defined]
    cache = decoder.new_cache(1, 256)
    assert isinstance(cache, OrtCache)
    binding = session.io_binding()
    config = model.bundle.model.decoder
    feeds = {
        "hidden": np.zeros((1, 1, config.dim), model.bundle.dtype),
        "position_ids": np.array([[16]]),
        "write_index": np.array([16]),
        "logits_index": np.array([0]),
    }
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    binding.bind_ortvalue_output(
        "logits", ort.OrtValue.ortvalue_from_numpy(np.zeros((1, config.vocab_size), np.float32))
    )
    cache.bind(binding)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="decode steps a round")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
        checkpoint.mkdir()
        config = pixtral_12b(args.layers, vision_layers=1, vocab_size=args.vocab_size)
        (checkpoint / "params.json").write_text(json.dumps(params_json(config)), encoding="utf-8")
        write_tokenizer(checkpoint / "tekken.json", args.vocab_size)
        write_weights(checkpoint / "consolidated.safetensors", config, seed=0)
        opened = open_checkpoint(checkpoint)
        plan = plan_export(opened, ExportSettings(dtype=args.dtype, max_context=4096))
        export(opened, plan, bundle, force=False, progress=lambda *_: None)
        model = load(bundle)
        stream_steps_ms(model, 3)
        bare_steps_ms(model, 3)
        through: list[float] = []
        bare: list[float] = []
        for _ in range(args.rounds):
            through += stream_steps_ms(model, args.steps)
            bare += bare_steps_ms(model, args.steps)
    medians = statistics.median(through), statistics.median(bare)
    print(
        json.dumps(
            {
                "layers": args.layers,
                "dtype": args.dtype,
                "steps": len(bare),
                "stream_step_ms": {"median": round(medians[0], 3), "quartiles": _quartiles(through)},
                "bare_step_ms": {"median": round(medians[1], 3), "quartiles": _quartiles(bare)},
                "overhead_percent": round(100 * (medians[0] / medians[1] - 1), 2),
            }
        )
    )


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


if __name__ == "__main__":
    main()
