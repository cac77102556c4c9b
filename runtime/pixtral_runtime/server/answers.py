"""Answers on their way from the model's thread to a client: what is new in each, as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from pixtral_runtime.errors import PixtralError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.logits import TokenLogprob
from pixtral_runtime.inputs.conversation import ToolCall
from pixtral_runtime.inputs.prompt import Piece
from pixtral_runtime.server.model_loop import ModelLoop


@dataclass(frozen=True)
class Delta:
    """What is new in one of a request's answers. With `finish_reason` it is the last, and has the calls of tools."""

    index: int
    pieces: tuple[Piece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    error: PixtralError | None = None


class Answers:
    """The answers to one request, under way from `open` to `close`."""

    def __init__(
        self, loop: ModelLoop, generations: Sequence[Generation], *, started_s: float, deadline_s: float
    ) -> None:
        """`started_s` is a moment of `time.monotonic`, `deadline_s` one of the event loop's clock."""
        self.generations = tuple(generations)
        self.started_s = started_s
        self.first_token_s: float | None = None  # after the start
        self._model_loop, self._deadline_s = loop, deadline_s
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._told = [(0, 0)] * len(self.generations)  # pieces, log-probabilities

    def open(self) -> None:
        """To be called in the event loop in which the deltas are awaited."""
        events = asyncio.get_running_loop()
        for index, generation in enumerate(self.generations):

            def listen(generation: Generation, index: int = index) -> None:
                delta = self._delta(index, generation)
                if not events.is_closed():
                    events.call_soon_threadsafe(self._deltas.put_nowait, delta)

            self._model_loop.submit(generation, listen)

    def close(self) -> None:
        """Give the slots of answers back that are not done."""
        for generation in self.generations:
            if generation.finish_reason is None:
                self._model_loop.cancel(generation)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, in the order in which it is made, until every answer is done. Raises TimeoutError."""
        left = len(self.generations)
        while left:
            async with asyncio.timeout_at(self._deadline_s):
                delta = await self._deltas.get()
            left -= delta.finish_reason is not None
            yield delta

    def _delta(self, index: int, generation: Generation) -> Delta:
        """In the model's thread."""
        if self.first_token_s is None and generation.token_ids:
            self.first_token_s = time.monotonic() - self.started_s
        text = generation.text
        if text is not None and generation.finish_reason is not None:
            text.finish()
        pieces, logprobs = self._told[index]
        new_pieces = () if text is None else tuple(text.pieces[pieces:])
        new_logprobs = tuple(generation.logprobs[logprobs:])
        self._told[index] = pieces + len(new_pieces), logprobs + len(new_logprobs)
        calls = () if text is None else text.tool_calls
        finish = "tool_calls" if calls else generation.finish_reason
        return Delta(index, new_pieces, new_logprobs, finish, calls, generation.error)


def text_of(deltas: Iterable[Delta], *, is_thinking: bool = False) -> str:
    """What deltas of one answer say, or what was thought before it."""
    pieces = (piece for delta in deltas for piece in delta.pieces)
    return "".join(piece.text for piece in pieces if piece.is_thinking == is_thinking)
