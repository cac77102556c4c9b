"""Tools, as the openai client sends and reads them. The model is tiny: what it calls is forced, or said in its name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from helpers.serving import NAME, Served

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["c", "f"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}
ASKED: Any = [{"role": "user", "content": "is it cold?"}]


def chat(server: Served, **options: Any) -> Any:
    options = {"messages": ASKED, "tools": [WEATHER, OTHER], "max_tokens": 120, **options}
    return server.client().chat.completions.create(model=NAME, **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_comes_in_the_clients_form(server: Served, seed: int) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tool_choice": named, "temperature": 1.0, "seed": seed, "parallel_tool_calls": False}
    (choice,) = chat(server, **options).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments)["unit"] in ("c", "f")
    streamed = [chunk.choices[0] for chunk in chat(server, stream=True, **options)]
    (delta,) = [one.delta.tool_calls[0] for one in streamed if one.delta.tool_calls]
    assert (delta.index, delta.function.name, delta.function.arguments) == (
        0,
        call.function.name,
        call.function.arguments,
    )
    assert streamed[-1].finish_reason == "tool_calls"
    assert not any(one.delta.content for one in streamed)


def test_the_result_of_a_call_is_read(server: Served) -> None:
    said = chat(server, tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=1).choices[0].message
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "-3"} for call in said.tool_calls]
    messages = [*ASKED, said.model_dump(), *results]
    found = chat(server, messages=messages, tool_choice="none")
    assert found.choices[0].message.tool_calls is None
    assert found.usage.prompt_tokens > chat(server, tool_choice="none").usage.prompt_tokens


def test_tools_are_part_of_the_prompt(server: Served) -> None:
    with_tools = chat(server, tool_choice="none", max_tokens=2).usage.prompt_tokens
    without = server.client().chat.completions.create(model=NAME, messages=ASKED, max_tokens=2).usage
    assert without is not None and with_tools > without.prompt_tokens


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("tool_choice", {"tool_choice": "perhaps"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "missing"}}}),
        ("tool_choice", {"tools": openai.NOT_GIVEN, "tool_choice": "required"}),
        ("tools", {"tools": [WEATHER, WEATHER]}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("parallel_tool_calls", {"parallel_tool_calls": "yes"}),
        ("messages", {"messages": [*ASKED, {"role": "tool", "tool_call_id": "x", "content": "1"}]}),
    ],
)
def test_tools_that_cannot_be_are_refused_by_their_field(server: Served, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        chat(server, **options)
    assert isinstance(raised.value.body, dict)
    assert (raised.value.body["param"] or "messages") == field
