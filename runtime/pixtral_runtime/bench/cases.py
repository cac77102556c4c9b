"""What is measured and what came of it, as data: cases, samples by stage, the rates ceilings are computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np

from pixtral_runtime.bench.spread import Spread, is_noisy, is_warm
from pixtral_runtime.errors import Option, SettingError
from pixtral_runtime.inputs.image import MAX_PIXELS
from pixtral_runtime.json_data import from_json

MODES = ("latency", "throughput", "serve")
LATENCY_STAGES = ("image", "preprocess", "vision", "prefill", "ttft", "tpot", "e2e")
THROUGHPUT_STAGES = ("requests_per_s", "tokens_per_s", "vision", "prefill", "decode")
KEPT_UP_SHARE = 0.9  # of the rate offered
SERVED_REQUESTS = 32


@dataclass(frozen=True)
class Case:
    """What is measured. `image_side` None means pictures of the user's, `prompt_tokens` 0 a short question.

    `batch` 0 means as many requests at a time as come, as for a server that others run.

    Raises SettingError for a picture that could not be decoded, before it is made.
    """

    mode: str
    batch: int
    decode_tokens: int
    image_side: int | None = None
    prompt_tokens: int = 0
    rate: float | None = None  # requests a second, of `serve`

    def __post_init__(self) -> None:
        if self.image_side is not None and self.image_side**2 > MAX_PIXELS:
            most = math.isqrt(MAX_PIXELS)
            raise SettingError(f"pictures of {self.image_side} px a side are not decoded", Option("image_side", most))

    @property
    def name(self) -> str:
        parts = [self.mode, f"{self.image_side} px" if self.image_side else "images"]
        if self.batch:
            parts.append(f"batch {self.batch}")
        if self.prompt_tokens:
            parts.append(f"{self.prompt_tokens} text tokens")
        if self.rate is not None:
            parts.append(f"{self.rate:g} requests/s")
        return ", ".join([*parts, f"{self.decode_tokens} new tokens"])


def case_combinations(
    mode: str,
    decode_tokens: int,
    *,
    image_sides_px: Sequence[int | None],
    prompt_tokens: Sequence[int],
    batches: Sequence[int],
    rates: Sequence[float | None],
) -> list[Case]:
    """A case for each combination, the last list varying fastest. None stands for what `Case` says it does."""
    return [
        Case(mode, batch, decode_tokens, side, text, rate)
        for side, text, batch, rate in product(image_sides_px, prompt_tokens, batches, rates)
    ]


@dataclass(frozen=True)
class Effort:
    """How often: at least `runs` times and `min_seconds`, after `warmup` runs that do not count."""

    runs: int = 10
    min_seconds: float = 0.0
    warmup: int = 2


@dataclass
class CaseResult:
    """Samples of a case by stage, in milliseconds, or by rate, per second. `shares` are of the ceiling, 0 to 1."""

    case: Case
    samples: dict[str, list[float]]
    tokens: dict[str, int] = field(default_factory=dict)  # prompt, image and new tokens of a request
    ceilings_ms: dict[str, float] = field(default_factory=dict)
    bound_by: dict[str, str] = field(default_factory=dict)
    energy: list[dict[str, Any]] = field(default_factory=list)  # of each meter, for a picture and for a new token
    memory: dict[str, Any] = field(default_factory=dict)  # `bench_memory.measured`
    costs: dict[str, dict[str, int]] = field(default_factory=dict)  # flops and bytes of a stage, for the whole batch
    server: dict[str, Any] = field(default_factory=dict)  # what became of the requests: `serving.Tally`

    @property
    def spreads(self) -> dict[str, Spread]:
        return {name: Spread.of(samples) for name, samples in self.samples.items() if samples}

    @property
    def shares(self) -> dict[str, float]:
        return {name: best / self.spreads[name].p50 for name, best in self.ceilings_ms.items() if name in self.samples}

    def remarks(self) -> list[str]:
        """What makes the figures doubtful, with the remedy."""
        if not self.samples:
            return []
        name = "e2e" if "e2e" in self.samples else next(iter(self.samples))
        samples, said = self.samples[name], []
        if not (warm := is_warm(samples)):
            said.append(f"{self.case.name}: {warm.reason}")
        if noisy := is_noisy(samples):
            said.append(f"{self.case.name}: {noisy.reason}")
        return said

    def to_dict(self) -> dict[str, Any]:
        spreads = {name: asdict(spread) for name, spread in self.spreads.items()}
        return asdict(self) | {"name": self.case.name, "spreads": spreads, "shares": self.shares}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CaseResult:
        """Inverse of `to_dict`. Raises TypeError."""
        computed = ("name", "spreads", "shares")
        return from_json(cls, {name: value for name, value in data.items() if name not in computed})


@dataclass(frozen=True)
class DeviceRates:
    """What the device reaches: bytes read a second, and operations a second of each stage's kind of matrices."""

    bandwidth_bytes_per_s: float
    flops_per_s: dict[str, float]
    attention_flops_per_s: float


def poisson_arrivals(rate: float, requests: int) -> tuple[list[float], float]:
    """When requests arrive, in seconds after the first, always the same; and what chance made of the `rate`."""
    gaps = np.random.default_rng(0).exponential(1 / rate, requests)
    return (np.cumsum(gaps) - gaps[0]).tolist(), requests / float(gaps.sum())


def knee(results: Sequence[CaseResult]) -> CaseResult | None:
    """Of rates served, the highest at which requests left as fast as they came, but for the last one's answer."""
    kept = [
        result
        for result in results
        if result.case.rate
        and result.samples
        and result.samples["requests_per_s"][0] >= KEPT_UP_SHARE * result.samples["offered_per_s"][0]
    ]
    return max(kept, key=lambda result: result.case.rate or 0, default=None)
