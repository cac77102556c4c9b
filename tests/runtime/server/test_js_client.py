"""The openai package for JavaScript, run by Node.js: what it is told is what the Python one is told."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.batches import batch_line, jsonl, picture_url
from helpers.places import IMAGES, ROOT
from helpers.serving import NAME, Served, served
from pixtral_runtime import Model
from pixtral_runtime.server.batches import BatchOptions

CLIENT = ROOT / "tests" / "js" / "client.mjs"
KEY = "secret"
PICTURE = "data:image/png;base64," + base64.b64encode(min(IMAGES.glob("*.png")).read_bytes()).decode()
QUESTION = "what shape is in the image?"
SEEN = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": QUESTION}],
    }
]
SEEN_INPUT = [
    {
        "role": "user",
        "content": [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}],
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "sure": {"type": "boolean"}},
    "required": ["shape", "sure"],
    "additionalProperties": False,
}
LOOK = {
    "name": "look",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"where": {"enum": ["up", "down"]}},
        "required": ["where"],
        "additionalProperties": False,
    },
}
ASKED = {"model": NAME, "messages": SEEN, "max_tokens": 12}
FORCED = {
    "tools": [{"type": "function", "function": LOOK}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "parallel_tool_calls": False,
    "max_tokens": 60,
}
FORM = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": SCHEMA}}
RESPOND = {"model": NAME, "input": SEEN_INPUT, "max_output_tokens": 12, "store": False}
OWN = ("id", "created", "created_at", "item_id", "call_id", "tool_call_id", "cached_tokens")
SAME: dict[str, tuple[str, Any]] = {
    "an answer": ("chat", ASKED),
    "an answer without a picture": ("chat", ASKED | {"messages": [{"role": "user", "content": "is it red?"}]}),
    "draws": ("chat", ASKED | {"n": 2, "temperature": 2.0, "seed": 5, "logprobs": True, "top_logprobs": 2}),
    "pieces": ("pieces", ASKED | {"stream_options": {"include_usage": True}}),
    "a schema": ("chat", ASKED | {"max_tokens": 60, "response_format": FORM}),
    "a call": ("chat", ASKED | FORCED),
    "a call in pieces": ("pieces", ASKED | FORCED),
    "a response": ("respond", RESPOND),
    "events": ("events", RESPOND),
    "models": ("models", None),
    "a model": ("model", {"name": NAME}),
    "a field that cannot be honoured": ("chat", ASKED | {"frequency_penalty": 0.5}),
    "the same before a stream": ("pieces", ASKED | {"temperature": -1}),
    "a picture that is none": (
        "chat",
        ASKED
        | {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}]}
            ]
        },
    ),
    "another model": ("chat", ASKED | {"model": "gpt-4o"}),
    "a model that is not there": ("model", {"name": "gpt-4o"}),
}
JS_ALONE: dict[str, tuple[str, Any]] = {
    "gathered": ("gathered", ASKED),
    "parsed": ("parsed", ASKED | {"max_tokens": 60, "response_format": FORM}),
    "tools": ("tools", ASKED | FORCED | {"result": "a square"}),
    "abandoned": ("abandoned", ASKED | {"max_tokens": 500, "logit_bias": {"77": 100}}),
}


def in_js(server: Served, key: str, requests: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """What the package was told, by the names of the requests."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js: apt-get install nodejs npm")
    if not (CLIENT.parent / "node_modules" / "openai").is_dir():
        pytest.skip("no openai package for Node.js: npm ci --prefix tests/js")
    asked = {"url": f"{server.url}/v1", "key": key, "requests": list(requests.values())}
    done = subprocess.run([node, str(CLIENT)], input=json.dumps(asked), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(requests, json.loads(done.stdout), strict=True))


def in_python(server: Served, how: str, body: Any) -> Any:
    client = server.client(KEY)
    ways: dict[str, Any] = {
        "chat": lambda: client.chat.completions.create(**body),
        "pieces": lambda: list(client.chat.completions.create(**body, stream=True)),
        "respond": lambda: client.responses.create(**body),
        "events": lambda: list(client.responses.create(**body, stream=True)),
        "models": lambda: list(client.models.list()),
        "model": lambda: client.models.retrieve(body["name"]),
    }
    try:
        found = ways[how]()
    except openai.APIStatusError as error:
        about = {"type": error.type, "param": error.param, "code": error.code}
        return {"error": type(error).__name__, "status": error.status_code, **about}
    return [one.to_dict() for one in found] if isinstance(found, list) else found.to_dict()


def comparable(value: Any) -> Any:
    """Without what is another at each request, and what the clients themselves add."""
    if isinstance(value, dict):
        return {name: comparable(one) for name, one in value.items() if name not in OWN}
    return [comparable(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[Served]:
    with served(model, (KEY,)) as running:
        yield running


@pytest.fixture
def batch_server(model: Model, tmp_path: Path) -> Iterator[Served]:
    with served(model, (KEY,), batches=BatchOptions(tmp_path)) as running:
        yield running


@pytest.fixture(scope="module")
def told(guarded: Served) -> dict[str, Any]:
    return in_js(guarded, KEY, SAME | JS_ALONE)


@pytest.mark.parametrize("name", SAME)
def test_both_packages_are_told_the_same(name: str, guarded: Served, told: dict[str, Any]) -> None:
    how, body = SAME[name]
    found = told[name]
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key not in ("message", "output_text")}
    assert comparable(found) == comparable(in_python(guarded, how, body))


def test_what_it_gathers_of_a_stream_is_the_answer(told: dict[str, Any]) -> None:
    gathered, whole = (told[name]["choices"][0] for name in ("gathered", "an answer"))
    assert gathered["message"]["content"] == whole["message"]["content"] != ""
    assert gathered["finish_reason"] == whole["finish_reason"]


def test_it_parses_an_answer_in_a_schema(told: dict[str, Any]) -> None:
    assert told["parsed"] == json.loads(told["a schema"]["choices"][0]["message"]["content"])
    assert told["parsed"]["shape"] in ("circle", "square")


def test_it_calls_a_function_itself(told: dict[str, Any]) -> None:
    (given,) = told["tools"]["given"]
    assert given["where"] in ("up", "down")
    assert told["tools"]["messages"][-1]["content"] == "a square"


def test_it_may_leave_a_stream(told: dict[str, Any], guarded: Served) -> None:
    assert told["abandoned"] == "chat.completion.chunk"
    assert in_python(guarded, "chat", ASKED)["choices"]


def test_it_sends_a_batch(batch_server: Served) -> None:
    lines = [batch_line(str(number), picture_url(number)) for number in range(3)]
    found = in_js(batch_server, KEY, {"batch": ("batch", {"lines": jsonl(*lines).decode()})})["batch"]
    assert (found["status"], found["counts"]) == ("completed", {"total": 3, "completed": 3, "failed": 0})
    outputs = {one["custom_id"]: one["response"]["body"] for one in map(json.loads, found["output"].splitlines())}
    for line in lines:
        expected = in_python(batch_server, "chat", line["body"])["choices"]
        assert outputs[line["custom_id"]]["choices"] == expected


def test_without_a_key_it_is_told_so(guarded: Served) -> None:
    found = in_js(guarded, "another", {"chat": ("chat", ASKED)})["chat"]
    assert (found["error"], found["status"]) == ("AuthenticationError", 401)
