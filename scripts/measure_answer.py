"""What a bundle takes on this machine's CPU: load time, memory, prefill and decode speed, share of memory bandwidth.

    python scripts/measure_answer.py artifacts/synthetic-int4 --prompt-tokens 128 --steps 8

Random text tokens, greedy, one request. Decode reads every weight of decoder graph and head once a token: bytes a token
times tokens a second, over the bandwidth that as many threads reach when they sum a large array, is the share. The
embedding is looked up row by row and not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from pixtral_runtime import load
from pixtral_runtime.bench.cpu_rates import measure_bandwidth
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import graph_weight_bytes
from pixtral_runtime.inputs.prompt import Prompt


def decode_bytes(bundle: Bundle) -> int:
    """Bytes of the decoder graph's weights, without the rotary tables."""
    return graph_weight_bytes(bundle, "decoder")


def read_bandwidth(threads: int, size: int = 1 << 30) -> float:
    """Bytes a second, the best of some passes over `size` bytes."""
    return measure_bandwidth(threads, size).max


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    started = time.perf_counter()
    model = load(args.bundle, threads=args.threads)
    load_s = time.perf_counter() - started
    vocabulary = model.bundle.model.decoder.vocab_size
    ids = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, args.prompt_tokens)
    prompt = Prompt(ids, np.full(len(ids), -1), (), 0)
    runner = model.runner
    cache = runner.sessions.decoder.new_cache(1, len(ids) + args.steps + 1)
    features = runner.encode_images(prompt)
    runner.prefill(prompt, features, cache)  # pages weights in
    started = time.perf_counter()
    logits = runner.prefill(prompt, features, cache)[-1]
    prefill_s = time.perf_counter() - started
    times = []
    for position in range(len(ids), len(ids) + args.steps):
        started = time.perf_counter()
        logits = runner.decode_token(int(logits.argmax()), position, cache)
        times.append(time.perf_counter() - started)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median_s = statistics.median(times)
    bandwidth, weights = read_bandwidth(args.threads), decode_bytes(model.bundle)
    print(
        json.dumps(
            {
                "precision": model.bundle.precision,
                "layers": model.bundle.model.decoder.n_layers,
                "threads": args.threads,
                "load_s": round(load_s, 1),
                "peak_rss_bytes": peak_rss_bytes,
                "prefill_tokens_per_s": round(len(ids) / prefill_s, 2),
                "decode_tokens_per_s": round(1 / median_s, 3),
                "decode_ms": [round(t * 1e3, 1) for t in (min(times), median_s, max(times))],
                "decode_weight_bytes": weights,
                "read_bandwidth_bytes_per_s": round(bandwidth),
                "share_of_bandwidth": round(weights / median_s / bandwidth, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
