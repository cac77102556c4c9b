"""How long the host takes to choose the next tokens, from candidates that a device picked and from whole rows.

Rows of 131,072 logits, peaked as a language model's are. Prints JSON: milliseconds a slot, medians.

    python scripts/measure_sampling.py
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np

from pixtral_runtime.generation.logits import Candidates, LogitsRow
from pixtral_runtime.generation.sampling import Sampler, Sampling

VOCABULARY, PICKED, STEPS = 131_072, 64, 15


def rows_of(slots: int, temperature: float) -> list[LogitsRow]:
    """What the decoder's form for CUDA hands over (`backends.candidates.pick_candidates`)."""
    random, rows = np.random.default_rng(slots), []
    for _ in range(slots):
        logits = (2.5 * random.standard_normal(VOCABULARY)).astype(np.float16).astype(np.float32)
        logits[random.integers(0, VOCABULARY, 40)] += 12
        ids = np.argsort(-logits, kind="stable")[:PICKED]
        mass = np.exp((logits - logits.max()) / (temperature or 1), dtype=np.float32).sum()
        rows.append(LogitsRow(lambda logits=logits: logits, Candidates(ids, logits[ids], float(mass))))  # type: ignore[misc]
    return rows


def milliseconds_a_slot(rows: list[LogitsRow], temperature: float) -> float:
    samplers = [Sampler(Sampling(temperature, seed=slot)) for slot in range(len(rows))]
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        for choose, row in zip(samplers, rows, strict=True):
            choose(row)
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e3 / len(rows), 4)


def main() -> None:
    for temperature in (0.0, 0.7):
        for slots in (1, 16, 64):
            rows = rows_of(slots, temperature)
            whole = [LogitsRow(row.whole) for row in rows]
            figures = {
                "picked": milliseconds_a_slot(rows, temperature),
                "rows": milliseconds_a_slot(whole, temperature),
            }
            print(json.dumps({"temperature": temperature, "slots": slots, "milliseconds a slot": figures}))


if __name__ == "__main__":
    main()
