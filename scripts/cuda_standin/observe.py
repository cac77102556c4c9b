"""What pixtral's CUDA backend does with a bundle over the CUDA stand-in, as one line of JSON (`records.Observation`).

    python scripts/cuda_standin/observe.py BUNDLE [--plant FAULT]      # in the environment that `build.py` made

Passes are the runtime's own: token ids in, embedding, decoder, candidates out. What is in the tensors means nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime as ort

from cuda_standin.plants import planted
from cuda_standin.records import (
    DECODE,
    FAULTS,
    MASKED,
    RECORDED,
    Nodes,
    Observation,
    Step,
    parse_profile,
    parse_report,
)
from device_results import native_log
from pixtral_runtime.backends.candidates import CANDIDATES
from pixtral_runtime.backends.cuda import CudaDevice
from pixtral_runtime.backends.ort_cuda import (
    ALIGNMENT,
    REPEATS_BEFORE_GRAPH,
    CudaSettings,
    open_cuda_sessions,
)
from pixtral_runtime.backends.session import KVCache
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.generation.logits import Logits
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.inputs.prompt import Prompt

PROMPT_TOKENS = 48
ROWS = 1024  # of a slot's cache, so that a copy of it stands out
SLOTS = (1, 4)
ATTENTION_LOG = "ONNX Attention: "
VERBOSE, MOST_VERBOSE, FATAL = 0, 10, 4


class Observer:
    """A bundle's graphs over the stand-in."""

    def __init__(self, bundle: Bundle, settings: CudaSettings) -> None:
        self.sessions = open_cuda_sessions(bundle, CudaDevice(), settings)
        self._bundle, self._runner = bundle, ModelRunner(bundle, self.sessions)
        self._runtime = ctypes.CDLL("libcudart.so.13")
        self._runtime.standin_report.restype = ctypes.c_char_p

    def new_cache(self, slots: int) -> KVCache:
        return self.sessions.decoder.new_cache(slots, ROWS)

    def encode(self) -> None:
        vision = self._bundle.model.vision
        height, width = 4 * vision.patch_size, 6 * vision.patch_size
        self._runner.encode([np.zeros((vision.num_channels, height, width), np.float32)])

    def prefill(self, cache: KVCache) -> None:
        prompt = Prompt(np.zeros(PROMPT_TOKENS, np.int64), np.full(PROMPT_TOKENS, -1), (), 0)
        self._read(self._runner.prefill_chunk(prompt, self._runner.no_features, cache, 0))

    def decode(self, cache: KVCache) -> None:
        slots = cache.slots
        tokens, starts = np.zeros((slots, 1), np.int64), np.full(slots, PROMPT_TOKENS)
        self._read(self._runner.decode_slots(tokens, starts, np.arange(slots), cache))

    @staticmethod
    def _read(logits: Logits) -> None:
        """As a sampler does that needs no more than candidates."""
        for row in logits:
            if row.candidates is None:
                row.whole()

    def step(self, name: str, slots: int, tokens: int = 1) -> Step:
        """The last of so many equal passes that it is a replay where there is a CUDA graph."""
        cache = self.new_cache(slots)
        for _ in range(REPEATS_BEFORE_GRAPH + 2):
            self._runtime.standin_reset()
            self.decode(cache) if tokens == 1 else self.prefill(cache)
        report = parse_report(self._runtime.standin_report().decode())
        ids, numbers = 8 * slots * tokens, 8 * slots
        feeds = [ids, ids, self._runner.no_features.nbytes]  # token_ids, feature_index, image_features
        feeds += [ids, numbers, numbers, 4 * slots]  # position_ids, write_index, logits_index, inverse_temperature
        candidates = min(CANDIDATES, self._bundle.model.decoder.vocab_size)
        feed_bytes = sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in feeds)
        return Step(name, slots, report, feed_bytes, 4 * slots * (2 * candidates + 1))

    def attention(self) -> dict[str, int]:
        """What ONNX Runtime logs of attention in a step, with how often."""
        lines: list[str] = []
        cache = self.new_cache(1)
        ort.set_default_logger_severity(VERBOSE)
        ort.set_default_logger_verbosity(MOST_VERBOSE)
        with native_log(lines):
            self.decode(cache)
        ort.set_default_logger_severity(FATAL)
        return dict(Counter(line.partition(ATTENTION_LOG)[2].strip() for line in lines if ATTENTION_LOG in line))


def observed_nodes(bundle: Bundle, settings: CudaSettings) -> dict[str, Nodes]:
    """Of one pass of each graph, in sessions that keep a profile."""
    with tempfile.TemporaryDirectory() as folder:

        class Profiled(ort.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling, self.profile_file_prefix = True, str(Path(folder, "profile"))

        with mock.patch.object(ort, "SessionOptions", Profiled):
            observer = Observer(bundle, settings)
        observer.encode()
        observer.decode(observer.new_cache(1))
        files = {graph: getattr(observer.sessions, graph)._session.end_profiling() for graph in GRAPHS}
        return {graph: parse_profile(json.loads(Path(file).read_text("utf-8"))) for graph, file in files.items()}


def observe(bundle: Bundle, fault: str | None) -> Observation:
    decoder = bundle.model.decoder
    cache_slot_bytes = ROWS * decoder.n_kv_heads * decoder.head_dim * np.dtype(bundle.cache_dtype).itemsize
    plain = CudaSettings(cuda_graphs=False, by_length=fault != MASKED)
    with planted(fault):
        observer = Observer(bundle, plain)
        steps = [observer.step("prefill", 1, PROMPT_TOKENS)]
        steps += [observer.step(DECODE, slots) for slots in SLOTS]
        if fault is None:  # a graph with a node on the CPU would not open
            recorder = Observer(bundle, CudaSettings())
            steps += [recorder.step(RECORDED, slots) for slots in SLOTS]
        return Observation(
            bundle.dtype, decoder.n_layers, cache_slot_bytes, observer.attention(), observed_nodes(bundle, plain), steps
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--plant", choices=FAULTS)
    args = parser.parse_args()
    print(json.dumps(asdict(observe(open_bundle(args.bundle), args.plant))))


if __name__ == "__main__":
    main()
