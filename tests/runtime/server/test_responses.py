"""The Responses API as the openai client speaks it: the answers of the chat API, in other words."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.places import ROOT
from helpers.serving import NAME, Served

PICTURES = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))
QUESTION = "what shape is in the image?"
TOOL: Any = {
    "type": "function",
    "name": "look",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"where": {"enum": ["up", "down"]}},
        "required": ["where"],
        "additionalProperties": False,
    },
}


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def seen(path: Path, text: str = QUESTION) -> Any:
    parts = [
        {"type": "input_image", "image_url": data_url(path), "detail": "auto"},
        {"type": "input_text", "text": text},
    ]
    return [{"role": "user", "content": parts}]


def respond(server: Served, asked: Any = "is there a circle?", **options: Any) -> Any:
    return server.client().responses.create(model=NAME, input=asked, **{"max_output_tokens": 12, **options})


def chat(server: Served, messages: Any) -> Any:
    return server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=12)


def test_a_text_is_answered_as_by_the_chat_api(server: Served) -> None:
    expected = chat(server, [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "is it red?"}])
    found = respond(server, "is it red?", instructions="Be exact.")
    assert found.output_text == expected.choices[0].message.content
    assert (found.status, found.object, found.model) == ("completed", "response", NAME)
    assert found.usage.input_tokens == expected.usage.prompt_tokens
    assert found.usage.output_tokens == expected.usage.completion_tokens
    assert found.instructions == "Be exact."


def test_a_picture_and_a_conversation_are_read(server: Served) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(PICTURES[0])}}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": "and what color?"},
    ]
    expected = chat(server, messages)
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "circle"}]}
    found = respond(server, [*seen(PICTURES[0]), answer, {"role": "user", "content": "and what color?"}])
    assert found.output_text == expected.choices[0].message.content
    assert found.usage.input_tokens == expected.usage.prompt_tokens
    assert found.usage.input_tokens_details.cached_tokens == found.usage.input_tokens - 1


def test_what_was_answered_can_be_sent_back(server: Served) -> None:
    first = respond(server, seen(PICTURES[1]))
    again = [*seen(PICTURES[1]), *(item.model_dump() for item in first.output), {"role": "user", "content": "why?"}]
    assert respond(server, again).usage.input_tokens > first.usage.input_tokens


def test_a_stream_builds_up_the_same_response(server: Served) -> None:
    whole = respond(server, seen(PICTURES[2]))
    events = list(respond(server, seen(PICTURES[2]), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-4].text
    assert events[-1].response.output_text == whole.output_text
    assert events[-2].item == events[-1].response.output[0]
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.id == events[-1].response.id


def test_the_clients_own_reader_of_streams_takes_it(server: Served) -> None:
    with server.client().responses.stream(model=NAME, input="is it red?", max_output_tokens=12) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == respond(server, "is it red?").output_text


def test_an_answer_that_is_cut_says_so(server: Served) -> None:
    found = respond(server, max_output_tokens=1)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = respond(server, max_output_tokens=1, stream=True)
    assert last.type == "response.incomplete"


def test_answers_are_json_of_a_schema(server: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "one", "strict": True, "schema": schema}}
    assert json.loads(respond(server, text=form, max_output_tokens=40).output_text) == {"a": 1}


def test_log_probabilities_are_told_where_they_are_asked_for(server: Served) -> None:
    found = respond(server, include=["message.output_text.logprobs"], top_logprobs=2)
    told = found.output[0].content[0].logprobs
    assert "".join(one.token for one in told) == found.output_text
    assert all(len(one.top_logprobs) == 2 for one in told)


def test_a_tool_is_called_and_its_result_read(server: Served) -> None:
    options = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}, "max_output_tokens": 80}
    options |= {"parallel_tool_calls": False, "temperature": 1.0}
    (call,) = respond(server, **options).output
    assert (call.type, call.name) == ("function_call", "look")
    assert json.loads(call.arguments)["where"] in ("up", "down")
    events = list(respond(server, stream=True, **options))
    (streamed,) = events[-1].response.output
    assert streamed.name == "look"
    assert [event.arguments for event in events if event.type.endswith("arguments.done")] == [streamed.arguments]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "a cat"}
    asked: Any = [{"role": "user", "content": "is there a circle?"}, call.model_dump(exclude_none=True), output]
    assert respond(server, asked, tools=[TOOL], tool_choice="none").output[0].type == "message"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("store", {"store": True}),
        ("background", {"background": True}),
        ("truncation", {"truncation": "auto"}),
        ("include", {"include": ["reasoning.encrypted_content"]}),
        ("conversation", {"conversation": "conv_1"}),
        ("tools[0]", {"tools": [{"type": "web_search"}]}),
        ("text", {"text": {"verbosity": "low"}}),
        ("temperature", {"temperature": -1}),
        ("input", {"asked": []}),
        ("input[0]", {"asked": [{"type": "item_reference", "id": "x"}]}),
        ("input[0].content[0]", {"asked": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}),
        ("input[0].content[0]", {"asked": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(server: Served, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        respond(server, **options)
    assert isinstance(raised.value.body, dict) and raised.value.body["param"] == field


def test_an_error_within_a_stream_is_an_event(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixtral_runtime.generation.scheduler import Scheduler

    step = Scheduler.step

    def fail_once(self: Scheduler) -> Any:
        monkeypatch.setattr(Scheduler, "step", step)
        raise RuntimeError("gone")

    monkeypatch.setattr(Scheduler, "step", fail_once)
    response = server.post("/v1/responses", {"input": "is it red?", "stream": True})
    kinds = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert kinds == ["response.created", "response.in_progress", "error", "response.failed"]
