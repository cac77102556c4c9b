"""What Prometheus reads: vLLM's names behind `pixtral:`, so that its dashboards need one word changed, and images.

As there, a `perc` is a share from 0 to 1, and hits and queries of the prefix cache count tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pixtral_runtime.device.energy import EnergyMeter
from pixtral_runtime.device.energy_meters import open_meters
from pixtral_runtime.errors import ImageError
from pixtral_runtime.server.answers import Answers
from pixtral_runtime.server.model_loop import ModelLoop
from pixtral_runtime.server.preparation import Prepared

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)


class Metrics:
    """Counts answers, and looks at the loop that makes them."""

    def __init__(self, loop: ModelLoop) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"pixtral:{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(f"pixtral:{name}", text, registry=registry).set_function(read)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"pixtral:{name}", text, registry=registry, buckets=SECONDS)

        gauge("num_requests_running", "Answers that have a slot.", lambda: loop.scheduler.running)
        gauge("num_requests_waiting", "Answers that wait.", lambda: loop.waiting)
        gauge("kv_cache_usage_perc", "Share of the KV cache's rows in use, 0 to 1.", lambda: loop.scheduler.cache_usage)
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._made = counter("generation_tokens", "Tokens of answers.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts whose rows were there already.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for.")
        self._done = counter("request_success", "Answers by the reason for which they ended.", "finished_reason")
        self._images = counter("images", "Pictures that were read.")
        self._image_tokens = counter("image_tokens", "Tokens of pictures in prompts.")
        self._image_errors = counter("image_errors", "Pictures that could not be used.")
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        registry.register(EnergyCounter(open_meters()))

    def count(self, prepared: Prepared, answers: Answers) -> None:
        """A request that is over, whole or not."""
        prompt = prepared.prompt
        self._images.inc(len(prompt.images))
        self._image_tokens.inc(prompt.image_tokens)
        for generation in prepared.generations:
            self._prompt.inc(len(prompt.token_ids))
            self._queries.inc(len(prompt.token_ids))
            self._hits.inc(generation.reused_tokens)
            self._made.inc(len(generation.token_ids))
            self._done.labels(generation.finish_reason or "abort").inc()
        if answers.first_token_s is not None:
            self._first.observe(answers.first_token_s)
        self._whole.observe(time.monotonic() - answers.started_s)

    def count_error(self, error: BaseException | None) -> None:
        """A request that could not be prepared, for this reason."""
        if isinstance(error, ImageError):
            self._image_errors.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class EnergyCounter(Collector):
    """Joules since the start, read when somebody asks."""

    def __init__(self, meters: Sequence[EnergyMeter]) -> None:
        self._meters = meters
        self._joules: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        for meter in meters:
            meter.start()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("pixtral:joules", "Energy since the start.", labels=("scope", "source"))
        with self._lock:
            for meter in self._meters:
                reading = meter.stop()
                meter.start()
                if reading.joules is not None:
                    key = reading.scope, reading.source
                    self._joules[key] = self._joules.get(key, 0.0) + reading.joules
            for labels, joules in self._joules.items():
                family.add_metric(labels, joules)
        yield family
