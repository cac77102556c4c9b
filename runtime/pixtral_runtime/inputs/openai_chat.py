"""A request of OpenAI's chat API: one JSON object that holds a conversation and how it is to be answered.

What cannot be honoured is refused by the name of its field, and never passed over: a client that asks for a penalty
would otherwise take the answer for one with it. Taken and not read are fields that change no answer (`IGNORED`), and
those at the value that does nothing (`NEUTRAL`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.errors import InputError, RequestError
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.openai_messages import OpenPicture, parse_message, shown
from pixtral_runtime.inputs.tools import Tools, parse_tools

IGNORED = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user",
})  # fmt: skip
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "ignore_eos": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "store": (False,),
    "top_k": (0, -1),
    "verbosity": ("medium",),
}
MOST_STOPS = 16
MOST_ANSWERS = 16  # of one request
MOST_TOP_LOGPROBS = 20
HIGHEST_TEMPERATURE = 100
LARGEST_BIAS = 100
ANY_OBJECT = '{"type": "object"}'
"""The schema of `response_format` "json_object"."""


class FieldError(RequestError):
    """A field of a request that cannot be honoured."""

    def __init__(self, name: str, reason: str, hint: str) -> None:
        super().__init__(f"{name}: {reason}", hint)
        self.field = name


@dataclass(frozen=True)
class ChatRequest:
    """What is asked and how. None is what the request does not say.

    `json_schema` is the text of a schema that the answer must follow. `top_logprobs` None tells no log-probabilities.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    answers: int = 1
    top_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str | None = None
    tools: Tools | None = None
    is_stream: bool = False
    wants_usage: bool = False


def parse_chat(body: object, open_picture: OpenPicture) -> ChatRequest:
    """Read a body of /v1/chat/completions. Raises FieldError, and ImageError for a picture that cannot be used."""
    if not isinstance(body, dict):
        raise FieldError("body", f"expected an object, found {shown(body)}", '{"messages": […]}')
    fields = _Fields(body)
    options = fields.object("stream_options")
    limits = {fields.whole(name, 1) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise FieldError("max_tokens", "it differs from max_completion_tokens", "keep one of the two")
    request = ChatRequest(
        messages=_messages(fields.take("messages"), open_picture),
        model=fields.text("model"),
        max_new_tokens=next(iter(limits), None),
        temperature=fields.number("temperature", 0, HIGHEST_TEMPERATURE),
        top_p=_top_p(fields),
        seed=fields.whole("seed", -(2**63)),
        stops=_stops(fields.take("stop")),
        answers=fields.whole("n", 1, MOST_ANSWERS) or 1,
        top_logprobs=_top_logprobs(fields),
        logit_bias=_logit_bias(fields.object("logit_bias")),
        json_schema=_json_schema(fields.object("response_format")),
        tools=_tools(fields),
        is_stream=fields.boolean("stream"),
        wants_usage=options.boolean("include_usage"),
    )
    options.take("include_obfuscation")  # pads pieces against eavesdroppers
    options.refuse_others("stream_options.")
    fields.refuse_others()
    return request


def check_tokens(biased: Iterable[int], vocabulary: int) -> None:
    """Raises FieldError for a token of a logit bias that a model of so many tokens lacks."""
    if unknown := [token for token in biased if token >= vocabulary]:
        raise FieldError("logit_bias", f"there is no token {unknown[0]}", f"ids below {vocabulary}")


class _Fields:
    """The fields of an object, each read once. null is as good as none."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise FieldError(name, f"expected a string, found {shown(value)}", "leave it away")
        return value

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise FieldError(name, f"expected true or false, found {shown(value)}", "leave it away")
        return bool(value)

    def object(self, name: str) -> _Fields:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise FieldError(name, f"expected an object, found {shown(value)}", "leave it away")
        return _Fields(value or {})

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            kind = f"a number from {least:g} to {most:g}"
            raise FieldError(name, f"expected {kind}, found {shown(value)}", "leave it away")
        return float(value)

    def whole(self, name: str, least: int, most: int = 2**63 - 1) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            kind = f"from {least} on" if most == 2**63 - 1 else f"from {least} to {most}"
            raise FieldError(name, f"expected a whole number {kind}, found {shown(value)}", "leave it away")
        return value

    def items(self) -> dict[str, Any]:
        """All that is left, taken."""
        left, self._left = self._left, {}
        return left

    def refuse_others(self, prefix: str = "") -> None:
        for name, value in self._left.items():
            if any((type(value) is not bool and value == one) or value is one for one in NEUTRAL.get(name, ())):
                continue
            if name in NEUTRAL:
                raise FieldError(prefix + name, f"{shown(value)} cannot be honoured", "leave it away")
            if prefix or name not in IGNORED:
                raise FieldError(prefix + name, "this server does not know the field", "leave it away")


def _messages(value: object, open_picture: OpenPicture) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        example = '"messages": [{"role": "user", "content": "…"}]'
        raise FieldError("messages", f"expected a list of messages, found {shown(value)}", example)
    messages = []
    for index, entry in enumerate(value):
        try:
            messages.append(parse_message(entry, open_picture))
        except InputError as error:
            if isinstance(error, RequestError):
                raise FieldError(f"messages[{index}]", str(error), error.hint) from error
            raise
    if messages[-1].role not in ("user", "tool"):
        raise FieldError("messages", "the last is not the user's", "end the conversation with what is asked")
    return tuple(messages)


def _tools(fields: _Fields) -> Tools | None:
    names = ("tools", "tool_choice", "parallel_tool_calls")
    try:
        return parse_tools(*(fields.take(name) for name in names))
    except RequestError as error:
        name, _, reason = str(error).partition(": ")
        is_named = name in names
        raise FieldError(name if is_named else "tools", reason if is_named else str(error), error.hint) from error


def _top_p(fields: _Fields) -> float | None:
    value = fields.number("top_p", 0, 1)
    if value == 0:
        raise FieldError("top_p", "0 leaves no token", '"temperature": 0 takes the likeliest')
    return value


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    is_list = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not is_list or not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise FieldError("stop", f"expected up to {MOST_STOPS} strings, found {shown(value)}", 'such as ["###"]')
    return tuple(stops)


def _top_logprobs(fields: _Fields) -> int | None:
    wanted, top = fields.boolean("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top and not wanted:
        raise FieldError("top_logprobs", "it goes with logprobs", '"logprobs": true')
    return (top or 0) if wanted else None


def _logit_bias(fields: _Fields) -> dict[int, float]:
    found = {}
    for name, value in fields.items().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (name.isascii() and name.isdecimal()) or not is_number or not abs(value) <= LARGEST_BIAS:
            kind = f"token ids with numbers from -{LARGEST_BIAS} to {LARGEST_BIAS}"
            raise FieldError("logit_bias", f"expected {kind}, found {shown({name: value})}", 'such as {"42": -100}')
        found[int(name)] = float(value)
    return found


def _json_schema(fields: _Fields) -> str | None:
    kind = fields.text("type")
    if kind == "json_schema":
        inner = fields.object("json_schema")
        schema = inner.take("schema")
        for name in ("name", "description"):
            inner.text(name)
        inner.boolean("strict")  # enforced either way
        inner.refuse_others("response_format.json_schema.")
        fields.refuse_others("response_format.")
        if not isinstance(schema, dict):
            raise FieldError(
                "response_format.json_schema.schema", f"expected an object, found {shown(schema)}", '{"type": "object"}'
            )
        return json.dumps(schema, ensure_ascii=False)
    fields.refuse_others("response_format.")
    if kind not in (None, "text", "json_object"):
        kinds = "text, json_object or json_schema"
        raise FieldError("response_format.type", f"expected {kinds}, found {shown(kind)}", "leave it away")
    return ANY_OBJECT if kind == "json_object" else None
