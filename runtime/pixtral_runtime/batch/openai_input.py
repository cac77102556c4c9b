"""A line of OpenAI's Batch API: a request of the chat API in an envelope that gives it an id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pixtral_runtime.batch.records import OwnSettings, Request
from pixtral_runtime.errors import RequestError
from pixtral_runtime.inputs.openai_chat import ChatRequest, FieldError, parse_chat
from pixtral_runtime.inputs.openai_messages import OpenPicture, shown

ENDPOINT = "/v1/chat/completions"
HONOURED = (
    "messages", "model", "max_new_tokens", "temperature", "top_p", "seed", "stops", "top_logprobs", "logit_bias",
    "json_schema", "answers", "is_stream", "wants_usage",
)  # fmt: skip
"""What of a `ChatRequest` a batch knows what to do with, if only to refuse it."""
KEYS = ("custom_id", "method", "url", "body")
EXAMPLE = f'{{"custom_id": "1", "method": "POST", "url": "{ENDPOINT}", "body": {{"messages": […]}}}}'


class LineError(RequestError):
    """A line that is no request. `code` and `field` are what OpenAI's API calls the mistake and its place."""

    def __init__(self, code: str, field: str | None, message: str, hint: str = f"such as {EXAMPLE}") -> None:
        super().__init__(message, hint)
        self.code, self.field = code, field


def is_batch_line(entry: Mapping[str, Any]) -> bool:
    """Whether a line of a request file is one of OpenAI's, and not of our own."""
    return "custom_id" in entry or "body" in entry


def open_envelope(entry: object) -> tuple[str, dict[str, Any]]:
    """The id of a line's request and its body. Raises LineError."""
    if not isinstance(entry, dict):
        raise LineError("invalid_json_line", None, f"expected an object, found {shown(entry)}")
    if unknown := sorted(set(entry) - set(KEYS)):
        raise LineError("unknown_parameter", unknown[0], f"unknown key {', '.join(map(repr, unknown))}")
    for key in KEYS:
        if entry.get(key) is None:
            raise LineError("missing_required_parameter", key, f"{key} is missing")
    id, method, url, body = (entry[key] for key in KEYS)
    if not isinstance(id, str) or not id:
        raise LineError("invalid_value", "custom_id", f"custom_id: expected a string, found {shown(id)}")
    if method != "POST":
        raise LineError("invalid_value", "method", f'method: expected "POST", found {shown(method)}')
    if url != ENDPOINT:
        raise LineError("url_mismatch", "url", f'url: expected "{ENDPOINT}", found {shown(url)}')
    if not isinstance(body, dict):
        raise LineError("invalid_value", "body", f"body: expected an object, found {shown(body)}")
    return id, body


def batch_request(id: str, body: dict[str, Any], open_picture: OpenPicture, max_new_tokens: int) -> Request:
    """The request of a body, whose answer has so many tokens unless it says. Raises FieldError, ImageError."""
    chat = parse_chat(body, open_picture)
    if chat.answers > 1:
        raise FieldError("n", f"{chat.answers} answers to one request of a batch", "a line for each")
    if chat.is_stream or chat.wants_usage:
        raise FieldError("stream", "a batch has nobody to stream to", "leave it away")
    nothing = ChatRequest(())
    for one in fields(chat):
        if one.name not in HONOURED and getattr(chat, one.name) != getattr(nothing, one.name):
            raise FieldError(one.name, "a batch cannot honour it", "leave it away, or ask the server")
    return Request(id, chat.messages, chat.max_new_tokens or max_new_tokens, _own(chat))


def _own(chat: ChatRequest) -> OwnSettings:
    return OwnSettings(
        chat.model,
        chat.temperature,
        chat.top_p,
        chat.seed,
        chat.stops,
        chat.top_logprobs,
        tuple(chat.logit_bias.items()),
        chat.json_schema,
    )
