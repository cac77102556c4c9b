"""Greedy tokens of a decoder as TensorRT parses it, whole and in parts, beside ONNX Runtime's.

    python scripts/check_parts.py BUNDLE --parts 1,4 --prompt 12 --steps 4

For bundles of a real size, whose networks take minutes a step in NumPy: random token ids are read in one call and
answered greedily. Each step's hidden states and cache are ONNX Runtime's, so that one wrong step cannot hide in the
next. Every step prints a line of JSON; the exit code is 6 where a token differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import parse_graph
from pixtral_engines.parts import even_cuts, specs_of
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.compare.parity import relative_error

ROWS = 256
Feeds = dict[str, Array]


def answer(bundle: Bundle, prompt: int, steps: int) -> Iterator[tuple[Feeds, Array]]:
    """What ONNX Runtime's decoder takes and which logits it gives, call by call."""
    embed, decoder = (ort.InferenceSession(bundle.graph_path(graph)) for graph in ("embed", "decoder"))
    config = bundle.model.decoder
    names = [output.name for output in decoder.get_outputs()]
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, prompt))
    shape = (1, config.n_kv_heads, ROWS, config.head_dim)
    pairs = bundle.graph_spec("decoder").caches
    cache = {past.name: np.zeros(shape, bundle.cache_dtype) for past, _ in pairs}
    start = 0
    for _ in range(steps):
        count = tokens.shape[1]
        none = {"image_features": np.zeros((1, config.dim), bundle.dtype), "feature_index": np.full((1, count), -1)}
        feeds = {
            "hidden": embed.run(None, {"token_ids": tokens, **none})[0],
            "position_ids": np.arange(start, start + count)[None],
            "write_index": np.array([start]),
            "logits_index": np.array([count - 1]),
            **cache,
        }
        found = dict(zip(names, decoder.run(None, feeds), strict=True))
        yield feeds | {"inverse_temperature": np.ones(1, np.float32)}, found["logits"]
        cache = {past.name: found[present.name] for past, present in pairs}
        tokens, start = found["logits"].argmax(1)[None], start + count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", default="1,4")
    parser.add_argument("--prompt", type=int, default=12, help="tokens that are read before the first answered one")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    bundle, trt = open_bundle(args.bundle), import_tensorrt("rtx")
    calls = list(answer(bundle, args.prompt, args.steps))
    gc.collect()
    wrong = 0
    for parts in map(int, args.parts.split(",")):
        cuts = even_cuts(bundle, parts)
        values = [dict(feeds) for feeds, _ in calls]
        for name, spec in specs_of(bundle, "decoder", cuts).items():
            parsed = parse_graph(bundle, "decoder", trt, ROWS, part=spec, cuts=cuts)
            network = Interpreter(parsed.network, trt, keep=parsed)
            taken = {tensor.name for tensor in network.inputs}
            for step, value in enumerate(values):
                began = time.perf_counter()
                made = network.run({key: array for key, array in value.items() if key in taken})
                value |= {key: array for key, array in made.items() if not key.startswith("present")}
                seconds = round(time.perf_counter() - began, 1)
                print(json.dumps({"parts": parts, "engine": name, "step": step, "seconds": seconds}), flush=True)
        for step, (value, (_, logits)) in enumerate(zip(values, calls, strict=True)):
            token, expected = int(value["logits"].argmax()), int(logits.argmax())
            wrong += token != expected
            error = relative_error(value["logits"], logits)
            line = {"parts": parts, "step": step, "token": token, "expected": expected, "largest_error": error}
            print(json.dumps(line), flush=True)
    sys.exit(6 if wrong else 0)


if __name__ == "__main__":
    main()
