"""Tools that an answer may call, as OpenAI's chat API describes them: functions with a schema of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pixtral_runtime.errors import RequestError
from pixtral_runtime.inputs.openai_messages import check_keys, shown, tool_name, typed_value

Choice = Literal["none", "auto", "required"]
CHOICES: tuple[Choice, ...] = ("none", "auto", "required")
TOOL_EXAMPLE = '{"type": "function", "function": {"name": "…", "parameters": {"type": "object", "properties": {…}}}}'
CHOICE_EXAMPLE = '"auto", or {"type": "function", "function": {"name": "…"}}'


@dataclass(frozen=True)
class Tool:
    """A function. Its arguments are an object of the JSON schema `parameters`; an empty one stands for no arguments.

    With `strict` a call has arguments of this schema and no others, else the model is trusted to read it.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class Tools:
    """What one answer may call: no tool, or as many as the model likes, or one at least; `named` is the only one.

    Without `parallel` it is one call at most.
    """

    tools: tuple[Tool, ...]
    choice: Choice = "auto"
    named: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.named in (None, tool.name))


def parse_tools(tools: object, tool_choice: object = None, parallel_tool_calls: object = None) -> Tools | None:
    """The three fields of a request to OpenAI's chat API; None where it has no tools. Raises RequestError."""
    if not isinstance(parallel_tool_calls, bool | None):
        raise RequestError(f"parallel_tool_calls: expected a boolean, found {shown(parallel_tool_calls)}", "true")
    if not isinstance(tools, list | None):
        raise RequestError(f"tools: expected a list, found {shown(tools)}", f"[{TOOL_EXAMPLE}]")
    parsed = tuple(_tool(tool) for tool in tools or ())
    names = [tool.name for tool in parsed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"tools: two have the name {twice[0]!r}", "give each tool a name of its own")
    choice, named = _choice("auto" if tool_choice is None else tool_choice)
    if named is not None and named not in names:
        raise RequestError(f"tool_choice: no tool has the name {named!r}", f"one of {', '.join(names) or 'no tools'}")
    if choice == "required" and not parsed:
        raise RequestError("tool_choice: a call is required, and there are no tools", f'"tools": [{TOOL_EXAMPLE}]')
    return Tools(parsed, choice, named, parallel_tool_calls is not False) if parsed else None


def _choice(value: object) -> tuple[Choice, str | None]:
    if isinstance(value, dict) and value.get("type") == "function":
        check_keys(value, ("type", "function"))
        function = typed_value(value, "function", dict, example=CHOICE_EXAMPLE)
        check_keys(function, ("name",))
        return "required", tool_name(function.get("name"))
    for choice in CHOICES:
        if value == choice:
            return choice, None
    raise RequestError(f"tool_choice: expected one of {', '.join(CHOICES)}, found {shown(value)}", CHOICE_EXAMPLE)


def _tool(value: object) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise RequestError(f'tools: expected objects of the type "function", found {shown(value)}', TOOL_EXAMPLE)
    check_keys(value, ("type", "function"))
    function = typed_value(value, "function", dict, example=TOOL_EXAMPLE)
    check_keys(function, ("name", "description", "parameters", "strict"))
    function = {key: part for key, part in function.items() if part is not None}  # as OpenAI has what is left open
    name = tool_name(function.get("name"))
    description = typed_value(function, "description", str, "", TOOL_EXAMPLE)
    strict = function.get("strict", False)
    if not isinstance(strict, bool):
        raise RequestError(f"strict: expected a boolean, found {shown(strict)}", "true")
    parameters = typed_value(function, "parameters", dict, {}, TOOL_EXAMPLE)
    if parameters and parameters.get("type") != "object":
        raise RequestError(
            f"the parameters of {name} are no JSON schema of an object, found {shown(parameters)}", TOOL_EXAMPLE
        )
    _check_schema(parameters, name)
    return Tool(name, description, parameters, strict)


def _check_schema(parameters: dict[str, Any], name: str) -> None:
    """As mistral-common will, so that the error says which tool it is."""
    from mistral_common.utils.json_utils import validate_json_schema_by_draft7

    try:
        validate_json_schema_by_draft7(parameters)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the parameters of {name} are no JSON schema: {reason}", TOOL_EXAMPLE) from error
