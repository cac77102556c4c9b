"""Answers as OpenAI's Responses API writes them: one object, or a stream of named events that build it up.

An answer has up to three kinds of items: what was thought, what is said, and calls of tools.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.batch.openai_output import token_of
from pixtral_runtime.inputs.conversation import ToolCall
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.server.answers import Delta, text_of
from pixtral_runtime.server.preparation import Prepared
from pixtral_runtime.server.problems import Problem

ASKED = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "tool_choice", "tools",
    "top_p",
)  # fmt: skip
"""Fields of a request that its response repeats."""


@dataclass
class ResponsesReply:
    """A `service.Reply` of the Responses API."""

    id: str
    model: str
    prompts: PromptBuilder
    prepared: Prepared
    body: Mapping[str, Any]
    created_s: int = field(default_factory=lambda: int(time.time()))
    _sequence: int = 0
    _items: int = 0  # that were opened
    _open: str = ""  # the kind of the item under way: reasoning, message, or none
    _text: str = ""  # of the item under way

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The response to a request that does not stream."""
        items: list[dict[str, Any]] = []
        if thinking := text_of(deltas, is_thinking=True):
            items.append(self._reasoning(len(items), thinking))
        calls = deltas[-1].tool_calls
        is_cut = deltas[-1].finish_reason == "length"
        if (text := text_of(deltas)) or not calls:
            logprobs = [one for delta in deltas for one in delta.logprobs]
            told = [self._logprob(one) for one in logprobs if one.token_id != self.prompts.bundle.model.eos]
            items.append(self._message(len(items), text, "incomplete" if is_cut else "completed", told))
        items += [self._call(len(items) + number, call) for number, call in enumerate(calls)]
        return self._response("incomplete" if is_cut else "completed", items)

    def opening(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", []))

    def more(self, delta: Delta) -> Iterator[bytes]:
        logprobs = [self._logprob(one) for one in delta.logprobs if one.token_id != self.prompts.bundle.model.eos]
        for piece in delta.pieces:
            yield from self._begin("reasoning" if piece.is_thinking else "message")
            self._text += piece.text
            place = {"item_id": self._item_id(self._items - 1), "output_index": self._items - 1, "content_index": 0}
            if piece.is_thinking:
                yield self._event("response.reasoning_text.delta", delta=piece.text, **place)
            else:
                yield self._event("response.output_text.delta", delta=piece.text, logprobs=logprobs, **place)
                logprobs = []

    def closing(self, deltas: Sequence[Delta]) -> Iterator[bytes]:
        calls = deltas[-1].tool_calls
        if not calls and self._open != "message":
            yield from self._begin("message")
        yield from self._end(deltas[-1].finish_reason == "length")
        for call in calls:
            index, item_id = self._items, self._item_id(self._items)
            self._items += 1
            item, place = self._call(index, call), {"item_id": item_id, "output_index": index}
            begun = item | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event("response.function_call_arguments.delta", delta=call.arguments, **place)
            yield self._event("response.function_call_arguments.done", arguments=call.arguments, **place)
            yield self._event("response.output_item.done", output_index=index, item=item)
        response = self.whole(deltas)
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, problem: Problem) -> Iterator[bytes]:
        error = problem.body()["error"]
        yield self._event("error", code=error["code"] or error["type"], message=error["message"], param=error["param"])
        failed = self._response("failed", []) | {"error": {"code": "server_error", "message": error["message"]}}
        yield self._event("response.failed", response=failed)

    # Items

    def _begin(self, kind: str) -> Iterator[bytes]:
        """Make an item of this kind the one under way."""
        if self._open == kind:
            return
        yield from self._end()
        index, self._open, self._text = self._items, kind, ""
        self._items += 1
        item = (
            self._reasoning(index, "") | {"content": [], "status": "in_progress"}
            if kind == "reasoning"
            else self._message(index, "", "in_progress") | {"content": []}
        )
        yield self._event("response.output_item.added", output_index=index, item=item)
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        yield self._event("response.content_part.added", part=self._part(), **place)

    def _end(self, is_cut: bool = False) -> Iterator[bytes]:
        """End the item under way."""
        if not self._open:
            return
        index = self._items - 1
        place = {"item_id": self._item_id(index), "output_index": index, "content_index": 0}
        if self._open == "reasoning":
            item = self._reasoning(index, self._text)
            yield self._event("response.reasoning_text.done", text=self._text, **place)
        else:
            item = self._message(index, self._text, "incomplete" if is_cut else "completed")
            yield self._event("response.output_text.done", text=self._text, logprobs=[], **place)
        yield self._event("response.content_part.done", part=self._part(), **place)
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._open = ""

    def _part(self) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _item_id(self, index: int) -> str:
        return f"{self.id.replace('resp_', 'item_')}_{index}"

    def _reasoning(self, index: int, text: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text}]
        return {
            "type": "reasoning",
            "id": self._item_id(index),
            "summary": [],
            "content": content,
            "status": "completed",
        }

    def _message(self, index: int, text: str, status: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
        return {
            "type": "message", "id": self._item_id(index), "role": "assistant", "status": status, "content": [part],
        }  # fmt: skip

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        return {
            "type": "function_call", "id": self._item_id(index), "call_id": call.id, "name": call.name,
            "arguments": call.arguments, "status": "completed",
        }  # fmt: skip

    def _logprob(self, one: Any) -> dict[str, Any]:
        top = [token_of(self.prompts, *other) for other in one.top]
        return token_of(self.prompts, one.token_id, one.logprob) | {"top_logprobs": top}

    # The response

    def _response(self, status: str, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        (generation,) = self.prepared.generations
        asked = {name: self.body.get(name) for name in ASKED}
        is_over = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": list(output),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **asked,
            "parallel_tool_calls": asked["parallel_tool_calls"] is not False,
            "temperature": generation.sampling.temperature,
            "tool_choice": asked["tool_choice"] or "auto",
            "tools": asked["tools"] or [],
            "top_p": generation.sampling.top_p,
            "text": self.body.get("text") or {"format": {"type": "text"}},
            "usage": self._usage() if is_over else None,
        }

    def _usage(self) -> dict[str, Any]:
        (generation,) = self.prepared.generations
        read, made = len(generation.prompt.token_ids), len(generation.token_ids)
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": generation.reused_tokens,
                "cache_write_tokens": 0,
                "image_tokens": generation.prompt.image_tokens,
            },
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": self.prompts.thought_tokens(generation.token_ids)},
            "total_tokens": read + made,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {data}\n\n".encode()
