"""How fast a server of OpenAI's chat API answers, as its clients see it: what `pixtral bench --url` measures.

Latency: one request at a time. Throughput: so many at a time, always, the next one as soon as one is answered. Serve:
requests come at random at a given rate, however many are under way, and each one's waiting counts.

Every request has a picture of its own and, where text is wanted, a text of its own, so that a server finds nothing in
its caches. All are encoded before a case begins, and one goes ahead of it that does not count.

Times are milliseconds, from sending a request, or from when it came in `serve`:

    sent ─▶ first piece of text (ttft) ─▶ pieces (step: between two, tpot: mean of a token after the first) ─▶ end (e2e)
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import numpy as np

from pixtral_runtime.bench.cases import SERVED_REQUESTS, Case, CaseResult, Effort, poisson_arrivals
from pixtral_runtime.bench.chat_client import REFUSED, Answer, ChatServer
from pixtral_runtime.bench.measure import BENCH_QUESTION, pictures
from pixtral_runtime.bench.report import Report
from pixtral_runtime.bench.run import Progress
from pixtral_runtime.inputs.openai_messages import data_uri_of
from pixtral_runtime.version import __version__
from pixtral_runtime.workers import start_workers

SEEDS = 1_000_000  # of pictures in a case and in a run
BUSY_SHARE = 0.5  # of a core; a client that takes more measures itself
CACHED_SHARE = 0.1  # of a prompt; what a template puts before every picture is less
MOST_REASONS = 5
FILLER = (
    "about after again always animal back because before book call city country day door earth end eye face family "
    "find follow food form friend good group hand hard head help here high home house idea keep kind land large learn "
    "letter life light line list little long look man most mother mountain move name near need never new night number "
    "often old open other page paper part people picture place plant play point right river school sea second set "
    "show side small sound start still story study such table thing think time tree turn under very walk water way "
    "well white word"
)
"""A token each, with the space before it, for nearly every tokenizer."""


@dataclass
class Tally:
    """What became of a case's requests, beside the times of those that were answered."""

    requests: int
    answered: int
    refused: int = 0  # by a server that has enough to do: 429
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    counted_by_server: bool = True  # tokens; otherwise pieces of text are counted
    other_length: int = 0  # answers that are shorter than asked, or longer
    came_at_once: int = 0  # answers in one piece
    cached_share: float = 0.0  # of the tokens of all prompts, what the server had in a cache
    client_busy: float = 0.0  # cores that measuring took
    sent_again: int = 0  # pictures that had been sent before

    @classmethod
    def of(cls, answers: Sequence[Answer], decode_tokens: int) -> Tally:
        good = [answer for answer in answers if not answer.error]
        reasons = Counter(answer.error for answer in answers if answer.error).most_common(MOST_REASONS)
        refused = sum(answer.status == REFUSED for answer in answers)
        return cls(
            len(answers),
            len(good),
            refused,
            len(answers) - len(good) - refused,
            dict(reasons),
            counted_by_server=all(answer.completion_tokens for answer in good),
            other_length=sum(answer.completion_tokens not in (None, decode_tokens) for answer in good),
            came_at_once=sum(len(answer.pieces_s) == 1 < answer.new_tokens for answer in good),
            cached_share=_share(
                sum(answer.cached_tokens or 0 for answer in good), sum(answer.prompt_tokens or 0 for answer in good)
            ),
        )

    def remarks(self, name: str) -> list[str]:
        """What makes a case's figures doubtful, or others than they look."""
        said = []
        if self.refused or self.failed:
            reasons = "; ".join(f"{count} × {reason}" for reason, count in self.reasons.items())
            said.append(f"{self.refused} refused and {self.failed} failed of {self.requests} requests: {reasons}")
        if not self.counted_by_server:
            said.append("the server says no usage: tokens are pieces of text, of which one may hold several")
        if self.other_length:
            said.append(f"{self.other_length} of {self.answered} answers have another length: compare tpot, not e2e")
        if self.came_at_once:
            said.append(f"{self.came_at_once} of {self.answered} answers came in one piece: ttft is the whole answer's")
        if self.cached_share > CACHED_SHARE:
            said.append(f"the server had {self.cached_share:.0%} of the prompts in its cache: take another seed")
        if self.sent_again:
            said.append(f"{self.sent_again} pictures had been sent before, which a server may remember: take more")
        if self.client_busy > BUSY_SHARE:
            said.append(f"the client took {self.client_busy:.0%} of a core: some of each time is its own")
        return [f"{name}: {remark}" for remark in said]


def run_server_benchmark(
    server: ChatServer,
    model: str,
    cases: Sequence[Case],
    effort: Effort,
    *,
    folder: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure each case in turn. `folder` are the user's own pictures, for cases without an `image_side`.

    Raises InputError where a case's first request has no answer, or none of all has one, and where a picture cannot be
    read.
    """
    results, remarks = [], list[str]()
    sent = 0
    for done, case in enumerate(cases):
        progress("cases", done, len(cases), case.name)
        requests = [*requests_of(case, model, folder, 1 + _count(case, effort), seed * SEEDS + sent)]
        sent += len(requests)
        first = server.ask(requests.pop())
        if first.error:
            raise server.refusal(f"{case.name}: {first.error}", first.status)
        result, tally = _measured(server, case, effort, requests)
        tally.sent_again = 0 if case.image_side else min(tally.requests, max(0, sent - len(folder)))
        result.server = asdict(tally)
        results.append(result)
        remarks += tally.remarks(case.name)
        remarks += result.remarks() if case.mode == "latency" else []
        if not any(result.samples for result in results):
            raise server.refusal(f"{case.name}: no request has an answer: {next(iter(tally.reasons))}", None)
    progress("cases", len(cases), len(cases), "")
    setting = {"server": server.name, "model": model, "client": f"pixtral {__version__}", "seed": seed}
    return Report(setting, results, remarks)


def case_samples(case: Case, answers: Sequence[Answer], begun_s: float) -> dict[str, list[float]]:
    """The samples of what was answered since `begun_s`, in the order of their ends; empty where nothing was.

    Rates of `throughput` are those of each `batch` of answers that end one after the other.
    """
    answers = sorted(answers, key=lambda answer: answer.ended_s)
    if not answers:
        return {}
    samples: dict[str, list[float]] = {
        "ttft": [answer.ttft_ms for answer in answers],
        "tpot": [answer.tpot_ms for answer in answers if answer.tpot_ms is not None],
        "e2e": [answer.e2e_ms for answer in answers],
        "step": [step for answer in answers for step in answer.steps_ms],
    }
    size = {"latency": 0, "throughput": case.batch, "serve": len(answers)}[case.mode]
    for first in range(0, len(answers) if size else 0, size or 1):
        part = answers[first : first + size]
        seconds = part[-1].ended_s - (answers[first - 1].ended_s if first else begun_s)
        if seconds > 0:
            samples.setdefault("requests_per_s", []).append(len(part) / seconds)
            samples.setdefault("tokens_per_s", []).append(sum(answer.new_tokens for answer in part) / seconds)
    return samples


def _count(case: Case, effort: Effort) -> int:
    """How many requests a case takes; `Effort`'s runs are of as many requests as are under way at a time."""
    if case.rate is not None:
        return max(SERVED_REQUESTS, math.ceil(case.rate * effort.min_seconds))
    return (effort.warmup + effort.runs) * case.batch


def requests_of(case: Case, model: str, folder: Sequence[Path], count: int, seed: int) -> list[bytes]:
    """Bodies of requests, each with another picture as long as there are some."""
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": case.decode_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bodies = []
    for number, data in enumerate(pictures(case, folder, count, seed)):
        words = max(0, case.prompt_tokens - len(BENCH_QUESTION.split()))
        filler = np.random.default_rng(seed + number).choice(FILLER.split(), words)
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_uri_of(data)}},
            {"type": "text", "text": " ".join([*filler, BENCH_QUESTION])},
        ]
        bodies.append(json.dumps(common | {"messages": [{"role": "user", "content": content}]}).encode())
    return bodies


def _measured(server: ChatServer, case: Case, effort: Effort, requests: Sequence[bytes]) -> tuple[CaseResult, Tally]:
    """A case's samples, and what became of its requests but those of the warm-up."""
    before, begun = time.process_time(), server.clock()
    if case.rate is None:
        answers, offered = keep_busy(server, requests, case.batch), None
    else:
        arrivals, offered = poisson_arrivals(case.rate, len(requests))
        answers = _let_arrive(server, requests, arrivals)
    busy = (time.process_time() - before) / max(server.clock() - begun, 1e-9)
    cold = 0 if case.rate is not None else effort.warmup * case.batch
    answers.sort(key=lambda answer: answer.ended_s)
    if cold:
        begun = answers[cold - 1].ended_s
    good = [answer for answer in answers[cold:] if not answer.error]
    result = CaseResult(case, case_samples(case, good, begun), _tokens(good))
    if result.samples and offered is not None:
        result.samples["offered_per_s"] = [offered]
    tally = Tally.of(answers[cold:], case.decode_tokens)
    tally.client_busy = round(busy, 3)
    return result, tally


def keep_busy(server: ChatServer, requests: Sequence[bytes], at_a_time: int) -> list[Answer]:
    """Answers of threads that send their next request when their last one is answered.

    A thread that is refused waits as its server asks: all that is left would be refused in no time.
    """
    done = SimpleQueue[Answer | Exception]()

    def ask(request: bytes) -> Answer:
        answer = server.ask(request)
        time.sleep(answer.again_s)
        return answer

    start_workers(at_a_time, deque(requests), ask, done)
    return [_answer(done) for _ in requests]


def _let_arrive(server: ChatServer, requests: Sequence[bytes], arrivals: Sequence[float]) -> list[Answer]:
    """Answers to requests of which none waits for another one's answer."""
    done = SimpleQueue[Answer | Exception]()
    begun = server.clock()
    for body, arrival in zip(requests, arrivals, strict=True):
        time.sleep(max(0.0, begun + arrival - server.clock()))
        start_workers(1, deque([(body, begun + arrival)]), lambda request: server.ask(*request), done)
    return [_answer(done) for _ in requests]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 3) if whole else 0.0


def _answer(done: SimpleQueue[Answer | Exception]) -> Answer:
    answer = done.get()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _tokens(answers: Sequence[Answer]) -> dict[str, int]:
    """Medians of a request's tokens, of those kinds that the server tells."""
    kinds: dict[str, list[int | None]] = {
        "prompt": [answer.prompt_tokens for answer in answers],
        "image": [answer.image_tokens for answer in answers],
        "new": [answer.new_tokens for answer in answers],
    }
    known = {kind: [count for count in counts if count is not None] for kind, counts in kinds.items()}
    return {kind: round(median(counts)) for kind, counts in known.items() if counts}
