"""The server as curl speaks to it, in the lines that documents show: what is printed, and with which exit code."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.batches import answers_of, batch_line, ended, jsonl, picture_url
from helpers.places import IMAGES
from helpers.serving import NAME, Served, served
from pixtral_runtime import Model
from pixtral_runtime.server.batches import BatchOptions

KEY = "secret"
PICTURE = min(IMAGES.glob("*.png"))
QUESTION = "what shape is in the image?"
JSON = ("-H", "Content-Type: application/json")


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[Served]:
    with served(model, (KEY,)) as running:
        yield running


def curl(server: Served, path: str, *options: str, key: str = KEY, sent: str = "") -> subprocess.CompletedProcess[str]:
    binary = shutil.which("curl")
    if binary is None:
        pytest.skip("no curl: apt-get install curl")
    line = [binary, "-sS", server.url + path, "-H", f"Authorization: Bearer {key}", *options]
    return subprocess.run(line, input=sent, capture_output=True, text=True, timeout=60)


def body(**options: Any) -> str:
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options})


@pytest.fixture(scope="module")
def expected(model: Model) -> str:
    return model.generate(QUESTION, [PICTURE], max_new_tokens=12).text


@pytest.mark.parametrize("how", ["a file", "standard input"])
def test_a_picture_is_asked_about(how: str, guarded: Served, expected: str, tmp_path: Path) -> None:
    (tmp_path / "ask.json").write_text(body(), encoding="utf-8")
    data, sent = (f"@{tmp_path / 'ask.json'}", "") if how == "a file" else ("@-", body())
    done = curl(guarded, "/v1/chat/completions", *JSON, "-f", "-d", data, sent=sent)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected


def test_a_large_body_is_sent_once_the_server_says_go_on(guarded: Served, expected: str) -> None:
    padded = body(metadata={"note": "x" * 2_000_000})
    done = curl(guarded, "/v1/chat/completions", *JSON, "-H", "Expect: 100-continue", "-d", "@-", sent=padded)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("protocol", ["--http1.1", "--http1.0"])
def test_an_answer_streams(protocol: str, guarded: Served, expected: str) -> None:
    done = curl(guarded, "/v1/chat/completions", *JSON, protocol, "-N", "-d", "@-", sent=body(stream=True))
    *events, last, rest = done.stdout.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("status", "key", "options", "data"),
    [
        (400, KEY, JSON, body(temperature=-1)),
        (400, KEY, JSON, "{"),
        (401, "wrong", JSON, body()),
        (404, KEY, JSON, body(model="another")),
        (415, KEY, (), body()),  # curl's own type, that of a form
    ],
)
def test_an_error_is_json_with_its_status(
    status: int, key: str, options: tuple[str, ...], data: str, guarded: Served
) -> None:
    shown = ("-d", "@-", "-w", "\n%{http_code} %{content_type}")
    done = curl(guarded, "/v1/chat/completions", *options, *shown, key=key, sent=data)
    text, _, line = done.stdout.rpartition("\n")
    assert line == f"{status} application/json"
    assert json.loads(text)["error"]["message"]
    failed = curl(guarded, "/v1/chat/completions", *options, "-f", "-d", "@-", key=key, sent=data)
    assert (failed.returncode, failed.stdout) == (22, "")


def test_what_is_read_without_a_body(guarded: Served) -> None:
    assert json.loads(curl(guarded, "/v1/models").stdout)["data"][0]["id"] == NAME
    assert curl(guarded, "/health", "-f", "-o", "/dev/null", "-w", "%{http_code}").stdout == "200"
    assert "pixtral:num_requests_running" in curl(guarded, "/metrics").stdout
    assert "HTTP/1.1 200 OK" in curl(guarded, "/health", "-I").stdout


def test_answers_follow_a_schema_and_tools_are_called(guarded: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "one", "strict": True, "schema": schema}}
    done = curl(guarded, "/v1/chat/completions", *JSON, "-d", "@-", sent=body(response_format=form, max_tokens=60))
    assert json.loads(json.loads(done.stdout)["choices"][0]["message"]["content"]) == {"a": 1}
    function = {"name": "look", "strict": True, "parameters": schema}
    forced = {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 90}
    sent = body(**forced, parallel_tool_calls=False)
    done = curl(guarded, "/v1/chat/completions", *JSON, "-d", "@-", sent=sent)
    (call,) = json.loads(done.stdout)["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("look", {"a": 1})


def test_a_batch_is_sent_and_fetched(model: Model, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_bytes(jsonl(batch_line("one", picture_url(0)), batch_line("two")))
    with served(model, (KEY,), batches=BatchOptions(tmp_path / "batches")) as server:
        form = ("-F", "purpose=batch", "-F", f"file=@{tmp_path / 'asked.jsonl'}")
        file = json.loads(curl(server, "/v1/files", *form).stdout)
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = json.loads(curl(server, "/v1/batches", *JSON, "-d", json.dumps(asked)).stdout)
        batch = ended(server.client(KEY), batch["id"])
        done = curl(server, f"/v1/files/{batch.output_file_id}/content", "-f")
    assert (done.returncode, [one["custom_id"] for one in answers_of(done.stdout)]) == (0, ["one", "two"])
