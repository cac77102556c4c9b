"""Answers as OpenAI's chat API writes them: one object, or chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.batch.openai_output import token_logprobs
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.logits import TokenLogprob
from pixtral_runtime.inputs.conversation import ToolCall
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.server.answers import Delta, text_of
from pixtral_runtime.server.preparation import Prepared
from pixtral_runtime.server.problems import Problem

DONE = b"data: [DONE]\n\n"


def event_of(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class ChatReply:
    """A `service.Reply` of the chat API."""

    id: str
    model: str
    prompts: PromptBuilder
    prepared: Prepared
    created_s: int = field(default_factory=lambda: int(time.time()))

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        choices = []
        for index in range(len(self.prepared.generations)):
            own = [delta for delta in deltas if delta.index == index]
            calls = own[-1].tool_calls
            content = text_of(own)
            message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
            message["refusal"] = None
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
            if thinking := text_of(own, is_thinking=True):
                message["reasoning_content"] = thinking
            logprobs = self._logprobs(one for delta in own for one in delta.logprobs)
            finish = own[-1].finish_reason
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        return self._head("chat.completion") | {
            "choices": choices,
            "usage": usage_of(self.prompts, self.prepared.generations),
        }

    def opening(self) -> Iterator[bytes]:
        for index in range(len(self.prepared.generations)):
            delta = {"role": "assistant", "content": ""}
            yield event_of(self._chunk({"index": index, "delta": delta, "finish_reason": None}))

    def more(self, delta: Delta) -> Iterator[bytes]:
        """What is new in one answer: its text, its thinking apart, and at the end why it ended."""
        logprobs = self._logprobs(delta.logprobs)
        parts: list[dict[str, Any]] = [
            {"reasoning_content" if piece.is_thinking else "content": piece.text} for piece in delta.pieces
        ]
        if not parts and delta.logprobs:
            parts.append({"content": ""})
        parts += [{"tool_calls": [{"index": number} | _call(call)]} for number, call in enumerate(delta.tool_calls)]
        for number, part in enumerate(parts):
            choice = {"index": delta.index, "delta": part, "finish_reason": None}
            yield event_of(self._chunk(choice | ({"logprobs": logprobs} if number == 0 else {})))
        if delta.finish_reason is not None:
            end = {"index": delta.index, "delta": {}, "finish_reason": delta.finish_reason}
            yield event_of(self._chunk(end))

    def closing(self, deltas: Sequence[Delta]) -> Iterator[bytes]:
        if self.prepared.request.wants_usage:
            usage = usage_of(self.prompts, self.prepared.generations)
            yield event_of(self._head("chat.completion.chunk") | {"choices": [], "usage": usage})
        yield DONE

    def failure(self, problem: Problem) -> Iterator[bytes]:
        yield event_of(problem.body())
        yield DONE

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.prepared.request.wants_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [{"logprobs": None} | choice]} | usage

    def _head(self, kind: str) -> dict[str, Any]:
        fingerprint = self.prompts.bundle.fingerprint
        return {
            "id": self.id, "object": kind, "created": self.created_s, "model": self.model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if self.prepared.request.top_logprobs is None:
            return None
        return {"content": token_logprobs(self.prompts, tokens), "refusal": None}


def usage_of(prompts: PromptBuilder, generations: Sequence[Generation]) -> dict[str, Any]:
    """Tokens read and made. The prompt counts once, however many answers it gets."""
    prompt = generations[0].prompt
    read, made = len(prompt.token_ids), sum(len(one.token_ids) for one in generations)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {
            "cached_tokens": generations[0].reused_tokens,
            "image_tokens": prompt.image_tokens,
            "text_tokens": read - prompt.image_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(prompts.thought_tokens(one.token_ids) for one in generations),
        },
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
