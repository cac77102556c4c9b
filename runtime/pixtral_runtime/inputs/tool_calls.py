"""Calls of tools between their two shapes: messages as clients write them, and tokens as models do.

mistral-common writes prompts. Answers are read here, in both forms that versions of the tokenizer have: up to 7 a JSON
list of calls, from 11 on a name, perhaps an id, and arguments, with a control token before each.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pixtral_runtime.inputs.conversation import TOOL_NAME, ToolCall
from pixtral_runtime.inputs.text_file import parsed_json
from pixtral_runtime.inputs.tools import Tools

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
MODEL_ID = re.compile(f"[A-Za-z0-9]{{{ID_LENGTH}}}")  # what models were trained with, and mistral-common insists on


@dataclass(frozen=True)
class CallTokens:
    """Control tokens around calls: without `args` they are JSON, without `call_id` they have no ids."""

    call: int
    args: int | None = None
    call_id: int | None = None

    @property
    def are_json(self) -> bool:
        return self.args is None


@dataclass(frozen=True)
class CallingAnswer:
    """What an answer says, and then calls. Malformed calls are text, and `is_malformed` says so."""

    text: str
    thinking: str | None
    tool_calls: tuple[ToolCall, ...]
    is_malformed: bool = False


def mistral_tools(tools: Tools) -> list[Any]:
    """The tools of a request to mistral-common."""
    from mistral_common.protocol.instruct.tool_calls import Function, Tool

    return [
        Tool(function=Function(name=tool.name, description=tool.description, parameters=dict(tool.parameters)))
        for tool in tools.tools
    ]


def mistral_calls(calls: Sequence[ToolCall]) -> list[Any]:
    """The calls of a message to mistral-common."""
    from mistral_common.protocol.instruct import tool_calls

    return [
        tool_calls.ToolCall(
            id=model_id(call.id), function=tool_calls.FunctionCall(name=call.name, arguments=call.arguments)
        )
        for call in calls
    ]


def model_id(id: str) -> str:
    """A call's id as models know it. One that comes from elsewhere becomes the same one every time."""
    if MODEL_ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest())
    return "".join(ID_CHARACTERS[number // 62**place % 62] for place in range(ID_LENGTH))


def new_id() -> str:
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))


def read_calls(
    token_ids: Sequence[int], tokens: CallTokens, detokenize: Callable[[Sequence[int]], str]
) -> tuple[ToolCall, ...] | None:
    """The calls of an answer's tokens from the first `tokens.call` on; None where they are malformed.

    A call without an id that models know, or with another one's, gets a new one.
    """
    parts: list[list[int]] = []
    for token in token_ids:
        if token == tokens.call:
            parts.append([])
        else:
            parts[-1].append(token)
    try:
        found = [call for part in parts for call in _read(part, tokens, detokenize)]
    except (ValueError, RecursionError):
        return None
    ids: set[str] = set()
    calls = []
    for id, name, arguments in found:
        if not MODEL_ID.fullmatch(id) or id in ids:
            id = new_id()
        ids.add(id)
        calls.append(ToolCall(id, name, arguments))
    return tuple(calls) or None


def _read(
    token_ids: list[int], tokens: CallTokens, detokenize: Callable[[Sequence[int]], str]
) -> list[tuple[str, str, str]]:
    """The calls behind one control token: id, name and arguments. Raises ValueError and RecursionError."""
    if tokens.args is None or tokens.args not in token_ids:
        calls = parsed_json(detokenize(token_ids))
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError("no list of calls")
        return [_checked(call.get("id"), call.get("name"), call.get("arguments")) for call in calls]
    place = token_ids.index(tokens.args)
    head, arguments = token_ids[:place], parsed_json(detokenize(token_ids[place + 1 :]))
    name_ends = head.index(tokens.call_id) if tokens.call_id in head else place
    return [_checked(detokenize(head[name_ends + 1 :]), detokenize(head[:name_ends]).strip(), arguments)]


def _checked(id: object, name: object, arguments: object) -> tuple[str, str, str]:
    if not isinstance(name, str) or TOOL_NAME.fullmatch(name) is None or not isinstance(arguments, dict):
        raise ValueError("no call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return id.strip() if isinstance(id, str) else "", name, text
