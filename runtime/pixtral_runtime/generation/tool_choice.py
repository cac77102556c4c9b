"""What an answer may call: constraints for a request's `tool_choice`, strict tools and `parallel_tool_calls`.

A grammar begins with the control token of a call, in the form that the tokenizer's version has, with the spaces that
models were trained with. Text and thoughts before calls are free, unless a call is required or the text has a schema.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from pixtral_runtime.generation.json_schema import (
    COMPACT_JSON,
    JsonSchema,
    check_compiler,
    check_schema,
    compile_grammar,
)
from pixtral_runtime.generation.sampling import Constraint
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.tool_calls import ID_LENGTH, CallTokens
from pixtral_runtime.inputs.tools import Tool, Tools

SPACED_JSON = COMPACT_JSON | {"item_separator": ", ", "key_separator": ": "}
NO_ARGUMENTS: Any = {"type": "object", "properties": {}, "additionalProperties": False}
ID = f"/[A-Za-z0-9]{{{ID_LENGTH}}}/"

Logits = npt.NDArray[np.float32]


class ToolChoice:
    """What the answers to one request may call, compiled. Each answer gets a constraint of its own."""

    def __init__(self, tools: Tools, calls: JsonSchema | None, prompts: PromptBuilder, tokens: CallTokens) -> None:
        self._choice, self._calls = tools.choice, calls
        self._call, self._think, self._eos = tokens.call, prompts.think_tokens, prompts.bundle.model.eos

    def constraint(self, schema: JsonSchema | None = None) -> Constraint | None:
        """None where any token may come. `schema` is what the answer must be where it calls nothing."""
        text = None if schema is None else schema.constraint()
        calls = None if self._calls is None else self._calls.constraint()
        if self._choice == "none":
            return NoCalls(self._call) if text is None else text
        if self._choice == "required" and calls is not None:
            return calls if self._think is None else ThoughtThenCalls(self._call, self._think, self._eos, calls)
        return None if text is None and calls is None else TextOrCalls(self._call, text, calls)


class NoCalls:
    """A `sampling.Constraint`: anything but a call."""

    is_complete = False

    def __init__(self, call: int) -> None:
        self._call = call

    def mask(self, logits: Logits) -> Logits:
        return _without(logits, [self._call])

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.isin(ids, [self._call], invert=True)

    def accept(self, token_id: int) -> None: ...


class TextOrCalls:
    """A `sampling.Constraint`: text, which may turn into calls. Text that is constrained is all text, or all calls."""

    def __init__(self, call: int, text: Constraint | None, calls: Constraint | None) -> None:
        self._call, self._calls = call, calls
        self._now = self._text = text
        self._may_call = True

    @property
    def is_complete(self) -> bool:
        return self._now is not None and self._now.is_complete

    def mask(self, logits: Logits) -> Logits:
        if self._now is None:
            return logits
        masked = self._now.mask(logits)
        if self._may_call:
            masked = masked.copy()
            masked[self._call] = logits[self._call]
        return masked

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        if self._now is None:
            return np.ones(len(ids), np.bool_)
        return self._now.allows(ids) | np.isin(ids, [self._call] if self._may_call else [])

    def accept(self, token_id: int) -> None:
        if self._may_call and token_id == self._call:
            self._now, self._may_call = self._calls, False
        elif self._text is not None:
            self._may_call = False
        if self._now is not None:
            self._now.accept(token_id)


class ThoughtThenCalls:
    """A `sampling.Constraint`: calls, before which a reasoning model may think."""

    def __init__(self, call: int, think: tuple[int, int], eos: int, calls: Constraint) -> None:
        self._call, self._eos, self._calls = call, eos, calls
        self._opens, self._closes = think
        self._is_begun = self._is_thinking = False

    @property
    def is_complete(self) -> bool:
        return self._calls.is_complete

    def mask(self, logits: Logits) -> Logits:
        if self._is_thinking:
            return _without(logits, [self._opens, self._call, self._eos])
        masked = self._calls.mask(logits)
        if not self._is_begun:
            masked = masked.copy()
            masked[self._opens] = logits[self._opens]
        return masked

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        if self._is_thinking:
            return np.isin(ids, [self._opens, self._call, self._eos], invert=True)
        return self._calls.allows(ids) | np.isin(ids, [] if self._is_begun else [self._opens])

    def accept(self, token_id: int) -> None:
        if self._is_thinking:
            self._is_thinking = token_id != self._closes
        elif not self._is_begun and token_id == self._opens:
            self._is_thinking = True
        else:
            self._calls.accept(token_id)
        self._is_begun = True


def _without(logits: Logits, tokens: list[int]) -> Logits:
    masked = logits.copy()
    masked[tokens] = -np.inf
    return masked


def compile_tools(tools: Tools, prompts: PromptBuilder) -> ToolChoice:
    """Compile what tools let an answer call.

    A required, a strict and a single call take a grammar. Raises RequestError where a strict tool's parameters cannot
    be enforced in full, MissingPackageError where a grammar is needed and llguidance is missing, and SettingError where
    it cannot read the tokenizer.
    """
    tokens, offered = prompts.call_tokens, tools.callable
    is_free = tools.choice == "auto" and tools.parallel and not any(tool.strict for tool in offered)
    if tools.choice == "none" or is_free:
        return ToolChoice(tools, None, prompts, tokens)
    check_compiler(
        prompts,
        "A call that is required, strict or single",
        'tool_choice "auto", tools that are not strict, and parallel calls',
    )
    from llguidance import LLMatcher

    for tool in offered:
        if tool.strict:
            check_schema(json.dumps(dict(tool.parameters), ensure_ascii=False), f"parameters of {tool.name}")
    grammar = LLMatcher.grammar_from_lark(
        _json_calls(tools, tokens) if tokens.are_json else _named_calls(tools, tokens)
    )
    calls = compile_grammar(
        grammar, prompts, "a strict tool", "what the tools take", "simpler parameters, or tools that are not strict"
    )
    return ToolChoice(tools, calls, prompts, tokens)


def _json_calls(tools: Tools, tokens: CallTokens) -> str:
    """Up to version 7: `[TOOL_CALLS][{"name": …, "arguments": …, "id": …}, …]`."""
    ways = [
        rf'"{{\"name\": \"{tool.name}\", \"arguments\": " %json {_arguments(tool)} id? "}}"' for tool in tools.callable
    ]
    more = ' (", " call)*' if tools.parallel else ""
    return _lark(f'start: <[{tokens.call}]> "[" call{more} "]"', ways, rf'", \"id\": \"" {ID} "\""')


def _named_calls(tools: Tools, tokens: CallTokens) -> str:
    """From version 11 on: `[TOOL_CALLS]name[ARGS]{…}` for each, before the arguments perhaps `[CALL_ID]id`."""
    ways = [
        f'<[{tokens.call}]> "{tool.name}" id? <[{tokens.args}]> %json {_arguments(tool)}' for tool in tools.callable
    ]
    id = '""' if tokens.call_id is None else f"<[{tokens.call_id}]> {ID}"
    return _lark(f"start: call{'+' if tools.parallel else ''}", ways, id)


def _lark(start: str, ways: list[str], id: str) -> str:
    rules = [f"call{number}: {way}" for number, way in enumerate(ways)]
    calls = " | ".join(f"call{number}" for number in range(len(ways)))
    return "\n".join((start, f"call: {calls}", *rules, f"id: {id}"))


def _arguments(tool: Tool) -> str:
    """The JSON schema of a call's arguments: of those of a tool that is not strict only that they are an object."""
    schema = (dict(tool.parameters) or NO_ARGUMENTS) if tool.strict else {"type": "object"}
    return json.dumps(schema | {"x-guidance": SPACED_JSON}, ensure_ascii=False)
