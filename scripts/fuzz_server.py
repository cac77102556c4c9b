"""Looks for requests that make the server fail: bodies that work, with parts of them put in each other's place. JSON.

    python scripts/fuzz_server.py artifacts/demo/bundle --count 5000 --seed 0
    python scripts/fuzz_server.py artifacts/demo/bundle --first 1234 --count 1       # one of them again

A body of each API is changed in up to three places: a value for an odd one or for another part of the body, a key
misspelt, left away or new. Whatever comes, the reply is an answer or a 4xx in OpenAI's form, streams end as they must,
and the same question has the same answer at the end as at the start. Exit 6 otherwise.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.serving import Served, served
from pixtral_runtime import load

PICTURE = Path(__file__).parents[1] / "tests" / "data" / "images" / "red_triangle_64x64.png"
URL = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "sides": {"type": "integer", "maximum": 9}},
    "required": ["shape"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "description": "Looks", "parameters": SCHEMA, "strict": True}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "look", "arguments": '{"shape":"circle"}'}}
PARTS = [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, {"type": "text", "text": "what is it?"}]
COMMON = {"temperature": 0.5, "top_p": 0.9, "stream": False}
CHAT = COMMON | {
    "messages": [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcDEF123", "content": "a circle"},
    ],
    "max_tokens": 3, "n": 2, "seed": 5, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "logit_bias": {"77": 1},
    "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto", "user": "u",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    "stream_options": {"include_usage": True},
}  # fmt: skip
RESPONSES = COMMON | {
    "input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "abcDEF123", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "abcDEF123", "output": "a circle"},
    ],
    "instructions": "Be exact.", "max_output_tokens": 3, "tools": [{"type": "function"} | FUNCTION],
    "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, "store": False,
}  # fmt: skip
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/tokenize": {"prompt": "hello", "messages": CHAT["messages"]},
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    "0", "x" * 10_000, "\0", "\ud800", "é€😀", "[INST]", "[TOOL_CALLS]", "</s>", "{}", "true", "null", [], [[]], {},
    {"": ""}, [None], [0], {"type": None}, {"type": "text"}, "data:,", "file:///etc/passwd", "http://[::", "auto",
)  # fmt: skip
NEEDED = ("messages", "input", "max_tokens", "max_output_tokens")
SAME = {"messages": [{"role": "user", "content": PARTS}], "max_tokens": 6}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list in a body, with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def changed(body: dict[str, Any], draw: random.Random) -> Any:
    body = copy.deepcopy(body)
    for name in draw.sample(sorted(body), draw.randrange(len(body))):  # fewer fields, so that the others are reached
        if name not in NEEDED:
            del body[name]
    body["stream"] = draw.random() < 0.3
    for _ in range(draw.randrange(4)):
        holder, key = draw.choice(list(places(body)))
        match draw.randrange(6):
            case 0 | 1:
                holder[key] = draw.choice(ODD)
            case 2:
                other, from_key = draw.choice(list(places(body)))
                holder[key] = copy.deepcopy(other[from_key])
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[f"{key}{draw.choice(('', 's', ' ', '.x'))}"] = draw.choice(ODD)
            case _ if isinstance(holder, list):
                holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(draw.choice((holder[key], *ODD))))
    return body


def complaint(status: int, kind: str, text: str) -> str:
    """What is wrong with a reply; nothing where it is as it must be."""
    if kind == "text/event-stream":
        is_whole = text.endswith("data: [DONE]\n\n") and 'data: {"error"' not in text
        is_whole |= any(f"\nevent: response.{end}\n" in text for end in ("completed", "incomplete"))
        return "" if status == 200 and is_whole else "a stream that does not end well"
    value = json.loads(text)
    if status == 200:
        return "" if {"choices", "output", "tokens"} & set(value) else "an answer without one"
    is_ours = 400 <= status < 500 and set(value["error"]) == {"message", "type", "param", "code"}
    return "" if is_ours else f"status {status}"


def ask(server: Served, path: str, body: Any) -> tuple[int, str, str]:
    connection = HTTPConnection(*server.service_address, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers.get_content_type(), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    statuses, wrong = Counter[str](), []
    with served(load(options.bundle), slots=4) as server:
        before = json.loads(ask(server, "/v1/chat/completions", SAME)[2])["choices"]
        for number in range(options.first, options.first + options.count):
            draw = random.Random(f"{options.seed} {number}")
            path = draw.choice(list(BODIES))
            body = changed(BODIES[path], draw)
            status, kind, text = ask(server, path, body)
            statuses[f"{path} {status}"] += 1
            if reason := complaint(status, kind, text):
                wrong.append({"number": number, "path": path, "reason": reason, "said": text[:300]})
                print(json.dumps(wrong[-1]), flush=True)
        is_same = json.loads(ask(server, "/v1/chat/completions", SAME)[2])["choices"] == before
        is_free = server.service.places.taken == 0 and not server.service.loop.scheduler.busy
    print(
        json.dumps({"statuses": dict(sorted(statuses.items())), "wrong": len(wrong), "same": is_same, "free": is_free})
    )
    sys.exit(0 if not wrong and is_same and is_free else 6)


if __name__ == "__main__":
    main()
