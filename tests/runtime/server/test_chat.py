"""The chat API as the openai client speaks it: each answer is the one that the model gives without a server."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.places import ROOT
from helpers.serving import NAME, Served
from pixtral_runtime import Message, Model, Sampling

PICTURES = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))
QUESTION = "what shape is in the image?"


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def asked(*pictures: Path, text: str = QUESTION, **detail: str) -> list[dict[str, Any]]:
    """A user's message, in OpenAI's words."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(path)} | detail} for path in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(server: Served, messages: Any, **options: Any) -> Any:
    options = {"max_tokens": 12, **options}
    return server.client().chat.completions.create(model=NAME, messages=messages, **options)


def test_an_answer_is_that_of_the_model(server: Served, model: Model) -> None:
    expected = model.generate(QUESTION, [PICTURES[0]], max_new_tokens=12)
    found = chat(server, asked(PICTURES[0]))
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.image_tokens == expected.image_tokens > 0
    assert found.model == NAME and found.system_fingerprint == model.bundle.fingerprint


def test_a_conversation_with_pictures_anywhere_is_read_as_it_is(server: Served, model: Model) -> None:
    second = asked(PICTURES[1], text="and here?")[0]["content"]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be exact."},
        {
            "role": "user",
            "content": [*asked(PICTURES[0])[0]["content"], *second],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "circle"}]},
        *asked(PICTURES[2], text="and this?"),
    ]
    expected = model.generate(
        [
            Message("system", ("Be exact.",)),
            Message("user", (PICTURES[0], QUESTION, PICTURES[1], "and here?")),
            Message("assistant", ("circle",)),
            Message("user", (PICTURES[2], "and this?")),
        ],
        max_new_tokens=12,
    )
    found = chat(server, messages)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(server: Served) -> None:
    whole = chat(server, asked(PICTURES[1]))
    chunks = list(chat(server, asked(PICTURES[1]), stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert all(part.usage is None for part in parts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["stop"]
    assert not last.choices and last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_ends_as_the_api_says(server: Served) -> None:
    body = {"messages": asked(PICTURES[0]), "max_tokens": 4, "stream": True}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


def test_several_answers_are_draws_of_their_own_and_come_again_with_the_seed(server: Served, model: Model) -> None:
    options = {"n": 4, "temperature": 3.0, "top_p": 1.0, "seed": 7}
    first, again = (chat(server, asked(PICTURES[0]), **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert texts[0] == model.generate(QUESTION, [PICTURES[0]], max_new_tokens=12, sampling=Sampling(3.0, 1.0, 7)).text
    streamed = ["", "", "", ""]
    for chunk in chat(server, asked(PICTURES[0]), stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_without_a_seed_draws_differ(server: Served) -> None:
    drawn = {chat(server, asked(PICTURES[0]), temperature=5.0, top_p=1.0).choices[0].message.content for _ in range(4)}
    assert len(drawn) > 1


def test_a_stop_string_ends_the_answer_and_is_not_told(server: Served) -> None:
    said = chat(server, asked(PICTURES[0])).choices[0].message.content
    found = chat(server, asked(PICTURES[0]), stop=said[2:4])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (said[:2], "stop")
    streamed = chat(server, asked(PICTURES[0]), stop=[said[2:4]], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said[:2]


def test_log_probabilities_stand_beside_their_tokens(server: Served) -> None:
    found = chat(server, asked(PICTURES[0]), logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    assert "".join(one.token for one in content) == found.choices[0].message.content
    for one in content:
        assert bytes(one.bytes).decode() == one.token
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token  # greedy
        assert one.top_logprobs[0].logprob == one.logprob <= 0
    streamed = chat(server, asked(PICTURES[0]), logprobs=True, top_logprobs=3, stream=True)
    told = [one for chunk in streamed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in told] == [one.token for one in content]


def test_a_bias_bans_a_token(server: Served) -> None:
    free = chat(server, asked(PICTURES[0]), logprobs=True)
    first = free.choices[0].logprobs.content[0].token
    tokens = server.post("/tokenize", {"prompt": first}).json()["tokens"]
    banned = chat(server, asked(PICTURES[0]), logit_bias={str(tokens[0]): -100}, logprobs=True)
    assert banned.choices[0].logprobs.content[0].token != first


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer_goes_by_both_names(server: Served, name: str) -> None:
    body = {"messages": asked(PICTURES[0]), name: 1}
    found = server.post("/v1/chat/completions", body).json()
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("length", 1)


def test_an_answer_without_a_limit_goes_on_to_the_end_of_the_context(server: Served) -> None:
    found = chat(server, asked(PICTURES[0]), max_tokens=None, logit_bias={"77": 100})
    assert (found.choices[0].finish_reason, found.usage.total_tokens) == ("length", 600)


def test_answers_are_json_of_a_schema(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "sure": {"type": "boolean"}},
        "required": ["shape", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": schema}}
    found = json.loads(
        chat(server, asked(PICTURES[0]), max_tokens=60, response_format=wanted).choices[0].message.content
    )
    assert found["shape"] in ("circle", "square") and isinstance(found["sure"], bool)


def test_answers_are_any_json_object(server: Served) -> None:
    found = chat(server, asked(PICTURES[0]), max_tokens=400, response_format={"type": "json_object"})
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(found.choices[0].message.content), dict)
    assert found.choices[0].message.content.startswith("{")


def test_a_picture_of_low_detail_takes_fewer_tokens(server: Served) -> None:
    large = max(PICTURES, key=lambda path: path.stat().st_size)
    high, low = (
        chat(server, asked(large, detail=detail)).usage.prompt_tokens_details.image_tokens for detail in ("high", "low")
    )
    assert low <= 272
    assert low <= high


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("n", 0),
        ("n", 999),
        ("stop", [1]),
        ("stop", ["a"] * 99),
        ("stop", [""]),
        ("seed", "x"),
        ("top_logprobs", 3),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"99999999": 1}),
        ("stream", "yes"),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("top_k", 40),
        ("store", True),
        ("best_of", 2),
        ("ignore_eos", True),
        ("min_tokens", 5),
        ("verbosity", "low"),
        ("modalities", ["audio"]),
        ("response_format", "json"),
        ("response_format.type", {"type": "xml"}),
        ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "object", "minProperties": 1}}}),
        ("stream_options.x", {"x": 1}),
        ("no_such_field", 1),
        ("messages", []),
        ("messages", "hello"),
        ("messages[0]", [{"role": "robot", "content": "x"}]),
        ("messages[0]", [{"role": "user", "content": [{"type": "audio"}]}]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(server: Served, field: str, value: object) -> None:
    body = {"messages": asked(PICTURES[0]), "max_tokens": 2} | {field.partition(".")[0].partition("[")[0]: value}
    response = server.post("/v1/chat/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert field in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"]},
        {"best_of": 1, "ignore_eos": False, "min_tokens": 0, "verbosity": "medium"},
        {"stop": None, "temperature": None, "n": None, "logit_bias": None, "response_format": {"type": "text"}},
    ],
)
def test_what_changes_nothing_is_taken(server: Served, fields: dict[str, object]) -> None:
    assert server.post("/v1/chat/completions", {"messages": asked(PICTURES[0]), "max_tokens": 2} | fields).is_success


def test_the_client_sees_errors_as_its_own(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(server, asked(PICTURES[0]), temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.client().chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])


def test_a_prompt_beyond_the_context_is_refused(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(server, asked(text="red " * 700))


def test_models_are_listed(server: Served) -> None:
    (found,) = server.client().models.list().data
    assert (found.id, found.object) == (NAME, "model")
    assert server.client().models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("another")


def test_tokens_of_a_conversation_are_those_of_its_prompt(server: Served) -> None:
    found = server.post("/tokenize", {"messages": asked(PICTURES[0])}).json()
    assert found["count"] == len(found["tokens"]) == chat(server, asked(PICTURES[0])).usage.prompt_tokens
    assert found["max_model_len"] == 600


def test_what_is_asked_again_is_not_read_again(server: Served) -> None:
    chat(server, asked(PICTURES[3]))
    hits = server.metric("prefix_cache_hits_total")
    again = chat(server, asked(PICTURES[3]))
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert server.metric("prefix_cache_hits_total") == hits + again.usage.prompt_tokens - 1
