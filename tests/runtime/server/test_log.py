"""What the log says of a request: never what was asked, unless the server is told to."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from helpers.places import ROOT
from helpers.serving import served
from pixtral_runtime import Model
from pixtral_runtime.inputs.openai_messages import data_uri

PICTURE = data_uri(ROOT / "tests" / "data" / "images" / "red_triangle_64x64.png")
MESSAGES: list[dict[str, object]] = [
    {"role": "system", "content": "be secretive"},
    {"role": "user", "content": "an earlier question"},
    {"role": "assistant", "content": "an earlier answer"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "the first part"},
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "text", "text": "the second part"},
        ],
    },
]


def lines_of(model: Model, caplog: pytest.LogCaptureFixture, **options: Any) -> list[dict[str, Any]]:
    """What is logged of one answer, and of one refusal."""
    with caplog.at_level(logging.INFO, "pixtral.requests"), served(model, **options) as server:
        for more in ({"max_tokens": 2}, {"temperature": -1}):
            server.post("/v1/chat/completions", {"messages": MESSAGES, **more}, **{"x-request-id": "mine"})
    lines = [record.msg for record in caplog.records if record.name == "pixtral.requests"]
    assert all(isinstance(line, dict) for line in lines)
    return [dict(line) for line in lines if isinstance(line, dict)]


def test_a_line_says_what_a_request_cost_and_not_what_it_asked(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    answered, refused = lines_of(model, caplog)
    assert (answered["request_id"], answered["status"], answered["new_tokens"]) == ("mine", 200, 2)
    assert answered["prompt_tokens"] > answered["image_tokens"] > 0
    assert (refused["status"], refused["path"]) == (400, "/v1/chat/completions")
    told = json.dumps([answered, refused])
    for secret in ("secretive", "earlier", "part", PICTURE[-40:]):
        assert secret not in told


def test_the_question_is_logged_where_that_is_wanted_and_no_picture(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    answered, refused = lines_of(model, caplog, logs_prompts=True)
    assert answered["question"] == "the first part\nthe second part"
    assert "question" not in refused
    assert PICTURE[-40:] not in json.dumps([answered, refused])
