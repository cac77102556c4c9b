"""A body of OpenAI's Responses API as one of the chat API, which says the same in other words.

A response is not kept here, so that none can be continued by its id: the conversation is sent along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pixtral_runtime.inputs.openai_chat import IGNORED, FieldError
from pixtral_runtime.inputs.openai_messages import shown

SAME = (
    "model", "parallel_tool_calls", "stream", "stream_options", "temperature", "tool_choice", "top_logprobs", "top_p",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "store": (False,),
    "tool_choice": ("auto",),
    "truncation": ("disabled",),
}
PARTS = {"input_text": "text", "output_text": "text", "text": "text", "input_image": "image"}
LOGPROBS = "message.output_text.logprobs"
EXAMPLE = '"input": "What is shown?", or a list of messages'


def chat_body(body: object) -> dict[str, Any]:
    """The chat API's body for one of the Responses API. Raises FieldError."""
    if not isinstance(body, dict):
        raise FieldError("body", f"expected an object, found {shown(body)}", '{"input": "…"}')
    left = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    chat = {name: left.pop(name) for name in SAME if name in left}
    messages = _messages(left.pop("input", None))
    if (instructions := left.pop("instructions", None)) is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    chat["messages"] = messages
    if "max_output_tokens" in left:
        chat["max_completion_tokens"] = left.pop("max_output_tokens")
    if "tools" in left:
        chat["tools"] = _listed("tools", left.pop("tools"), _tool)
    if isinstance(chat.get("tool_choice"), dict):
        named = chat["tool_choice"]
        chat["tool_choice"] = {"type": named.get("type"), "function": {"name": named.get("name")}}
    chat |= _format(left.pop("text", {}))
    included = left.pop("include", [])
    if included not in ([], [LOGPROBS]):
        raise FieldError("include", f"{shown(included)} cannot be honoured", f'["{LOGPROBS}"]')
    if included or chat.get("top_logprobs"):
        chat["logprobs"] = True
    for name, value in left.items():
        if name not in NEUTRAL:
            raise FieldError(name, "this server does not know the field", "leave it away")
        if not any(value is one or (value == one and not isinstance(value, int)) for one in NEUTRAL[name]):
            raise FieldError(name, f"{shown(value)} cannot be honoured", "leave it away")
    return chat


def _messages(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[dict[str, Any]] = []
    for message in _listed("input", value, _item):
        before = messages[-1] if messages else {}
        if "tool_calls" in message and before.get("role") == "assistant":  # what was said and called in one turn
            before["tool_calls"] = [*before.get("tool_calls", ()), *message["tool_calls"]]
        elif message:
            messages.append(message)
    return messages


def _item(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = _listed(f"{where}.content", content, _part)
        return {"role": item.get("role"), "content": content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        content = _listed(f"{where}.output", output, _part) if isinstance(output, list) else output
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    if kind == "reasoning":  # what was thought before is not read again
        return {}
    raise FieldError(where, f"no item of the type {shown(kind)} can be read", EXAMPLE)


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = PARTS.get(str(part.get("type")))
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind == "image" and part.get("image_url") is not None:
        detail = {"detail": part["detail"]} if part.get("detail") is not None else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"]} | detail}
    raise FieldError(where, f"{shown(dict(part))} can be no part", "input_text, or input_image with an image_url")


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise FieldError(where, f"no tool of the type {shown(tool.get('type'))}", '{"type": "function", "name": "…"}')
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _format(text: object) -> dict[str, Any]:
    if not isinstance(text, dict):
        raise FieldError("text", f"expected an object, found {shown(text)}", '"text": {"format": {"type": "text"}}')
    if unknown := sorted(set(text) - {"format", "verbosity"}) or text.get("verbosity") not in (None, "medium"):
        raise FieldError("text", f"{shown(unknown)} cannot be honoured", "leave it away")
    form = text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return {} if form is None else {"response_format": form}
    schema = {name: value for name, value in form.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _listed(name: str, value: object, read: Callable[[Mapping[str, Any], str], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each object of a list says."""
    if not isinstance(value, list) or not value:
        raise FieldError(name, f"expected a list of objects, found {shown(value)}", EXAMPLE)
    found = []
    for index, one in enumerate(value):
        if not isinstance(one, dict):
            raise FieldError(f"{name}[{index}]", f"expected an object, found {shown(one)}", EXAMPLE)
        found.append(read(one, f"{name}[{index}]"))
    return found
