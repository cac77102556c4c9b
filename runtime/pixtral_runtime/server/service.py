"""What the routes share: the model behind its thread, places in the queue, and how one request is answered."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pixtral_runtime.generation.feature_cache import FeatureCache
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.server.answers import Answers, Delta
from pixtral_runtime.server.batches import BatchApi, BatchOptions
from pixtral_runtime.server.http import EventStream, read_body, unless_left
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.metrics import Metrics
from pixtral_runtime.server.model_loop import ModelLoop
from pixtral_runtime.server.preparation import Preparation, Prepared
from pixtral_runtime.server.problems import Problem, problem_of
from pixtral_runtime.server.remote_media import Fetcher

LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Limits:
    """What one client may cost the others."""

    queue: int = 256  # answers that may wait beside those that have a slot
    body_bytes: int = 50_000_000
    request_s: float = 600.0


@dataclass(frozen=True)
class ServiceOptions:
    """How a service works. `context` is the most tokens of a prompt and its answer, None for the bundle's own limit.

    `slots` answers are worked on at a time. `max_new_tokens` is the longest answer of requests that do not say. With
    `logs_prompts` the line of log of a request holds what the user asked last.
    """

    name: str
    slots: int = 1
    context: int | None = None
    max_new_tokens: int | None = None
    drafts: int = 0
    features: FeatureCache | None = None
    media: Media = field(default_factory=Media)
    fetcher: Fetcher = field(default_factory=Fetcher)
    limits: Limits = field(default_factory=Limits)
    logs_prompts: bool = False
    batches: BatchOptions | None = None  # None: the Batch API is not there


class Reply(Protocol):
    """How one API writes answers."""

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """All of them, when they are done."""

    def opening(self) -> Iterable[bytes]:
        """Server-sent events before the first token, those of a delta, and those at the end; or of what went wrong."""

    def more(self, delta: Delta) -> Iterable[bytes]: ...

    def closing(self, deltas: Sequence[Delta]) -> Iterable[bytes]: ...

    def failure(self, problem: Problem) -> Iterable[bytes]: ...


@dataclass
class Places:
    """How many answers are under way. Whoever comes when all places are taken is told when to come again."""

    slots: Callable[[], int]
    queue: int
    taken: int = 0
    seconds: float = 1.0  # an answer has its place, a running mean
    on_free: Callable[[], None] = lambda: None

    @property
    def is_full(self) -> bool:
        return self.taken >= self.slots() + self.queue

    def take(self, count: int) -> None:
        """Raises Problem 429."""
        if self.taken + count > self.slots() + self.queue:
            wait_s = self.seconds * (self.taken + count) / self.slots()
            raise Problem(
                429,
                f"{self.taken} answers are under way, and no more may wait",
                code="queue_full",
                retry_s=max(1, min(math.ceil(wait_s), LONGEST_RETRY_S)),
            )
        self.taken += count

    def give_back(self, count: int, seconds: float | None) -> None:
        """`seconds` is how long they were taken, None where there was no answer to learn from."""
        self.taken -= count
        if seconds is not None:
            self.seconds += (seconds - self.seconds) / 16
        self.on_free()


@dataclass
class Ticket:
    """A request's places, until they are given back."""

    places: Places
    count: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def take(self, count: int) -> None:
        self.places.take(count)
        self.count += count

    def give_back(self, *, is_answered: bool) -> None:
        self.places.give_back(self.count, time.monotonic() - self.started_s if is_answered else None)
        self.count = 0


class Service:
    """A model that answers requests of several APIs."""

    def __init__(self, model: Model, options: ServiceOptions) -> None:
        self.model, self.name, self.limits = model, options.name, options.limits

        def new_scheduler() -> Scheduler:
            return Scheduler(
                model.bundle,
                model.runner,
                options.slots,
                drafts=options.drafts,
                features=options.features,
                context=options.context,
            )

        self.loop = ModelLoop(new_scheduler)
        context = self.loop.scheduler.context
        self.preparation = Preparation(model.prompts, context, options.media, options.fetcher, options.max_new_tokens)
        self.places = Places(lambda: self.loop.scheduler.slots, options.limits.queue)
        self.metrics = Metrics(self.loop)
        self.created_s = int(time.time())
        self.is_stopping = False
        self._logs_prompts = options.logs_prompts
        self.batches: BatchApi | None = None
        if options.batches is not None:
            self.batches = BatchApi(
                options.batches, model, options.media, self.loop, self._free_slots, options.max_new_tokens
            )
            self.places.on_free = self.batches.worker.wake

    def start(self) -> None:
        self.loop.start()
        if self.batches is not None:
            self.batches.worker.start()

    def stop(self) -> None:
        if self.batches is not None:
            self.batches.stop()
        self.loop.stop()
        self.preparation.close()

    def _free_slots(self) -> int:
        """Slots that no live request has or waits for."""
        return 0 if self.is_stopping else self.loop.scheduler.slots - self.places.taken

    async def body(self, request: Request) -> Any:
        """The JSON of a request. Raises Problem."""
        return await self.preparation.json(await read_body(request, self.limits.body_bytes))

    async def answer(self, request: Request, body: Any, reply_of: Callable[[str, Prepared], Reply]) -> Response:
        """Answer a body of the chat API. Raises Problem."""
        if self.is_stopping:
            raise Problem(503, "the server is stopping", retry_s=1)
        if not self.loop.is_alive:
            raise Problem(503, "the model has failed", retry_s=LONGEST_RETRY_S)
        self._check_model(body)
        ticket = Ticket(self.places)
        ticket.take(1)
        answers = None
        deadline_s = asyncio.get_running_loop().time() + self.limits.request_s
        try:
            async with asyncio.timeout_at(deadline_s):
                prepared = await unless_left(request.receive, self.preparation.prepare(body))
            if self._logs_prompts:
                request.scope["state"]["log"]["question"] = last_question(prepared.request.messages)
            ticket.take(len(prepared.generations) - 1)
            answers = Answers(self.loop, prepared.generations, started_s=ticket.started_s, deadline_s=deadline_s)
            answers.open()
            reply = reply_of(secrets.token_hex(12), prepared)
            finish = self._finisher(request, prepared, answers, ticket)
            if prepared.request.is_stream:
                return EventStream(self._events(reply, answers), finish)
            try:
                return JSONResponse(await unless_left(request.receive, self._whole(reply, answers)))
            finally:
                finish()
        except Problem as problem:
            self.metrics.count_error(problem.__cause__)
            raise
        except TimeoutError:
            raise Problem(504, f"no answer within {self.limits.request_s:g} s") from None
        finally:
            if answers is None:
                ticket.give_back(is_answered=False)

    def _check_model(self, body: Any) -> None:
        asked = body.get("model") if isinstance(body, dict) else None
        if isinstance(asked, str) and asked != self.name:
            raise Problem(
                404, f"there is no model {asked!r} here, but {self.name!r}", field="model", code="model_not_found"
            )

    async def _whole(self, reply: Reply, answers: Answers) -> dict[str, Any]:
        deltas = []
        async for delta in answers.deltas():
            if delta.error is not None:
                raise problem_of(delta.error)
            deltas.append(delta)
        return reply.whole(deltas)

    async def _events(self, reply: Reply, answers: Answers) -> AsyncIterator[bytes]:
        deltas = []
        try:
            for event in reply.opening():
                yield event
            async for delta in answers.deltas():
                if delta.error is not None:
                    raise problem_of(delta.error)
                deltas.append(delta)
                for event in reply.more(delta):
                    yield event
            for event in reply.closing(deltas):
                yield event
        except TimeoutError:
            for event in reply.failure(Problem(504, f"no whole answer within {self.limits.request_s:g} s")):
                yield event
        except Problem as problem:
            for event in reply.failure(problem):
                yield event

    def _finisher(self, request: Request, prepared: Prepared, answers: Answers, ticket: Ticket) -> Callable[[], None]:
        """What is to be done when a reply is over, whole or not."""

        def finish() -> None:
            answers.close()
            ticket.give_back(is_answered=all(one.finish_reason for one in prepared.generations))
            self.metrics.count(prepared, answers)
            log = request.scope["state"]["log"]
            log |= {
                "prompt_tokens": len(prepared.prompt.token_ids),
                "image_tokens": prepared.prompt.image_tokens,
                "new_tokens": sum(len(one.token_ids) for one in prepared.generations),
                "finish_reasons": [one.finish_reason or "left" for one in prepared.generations],
            }

        return finish


def last_question(messages: Sequence[Message]) -> str:
    """The text of the user's last message, without its pictures."""
    parts = next((message.content for message in reversed(messages) if message.role == "user"), ())
    return "\n".join(part for part in parts if isinstance(part, str))
