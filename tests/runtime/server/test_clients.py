"""Bodies as other clients send them, field by field: answered, or refused by the field that cannot be honoured.

Those of LangChain, LiteLLM and instructor were recorded from the packages; the others follow their published source.
Only the picture, the texts and the lengths are ours.
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from helpers.places import IMAGES
from helpers.serving import NAME, Served

PICTURE = "data:image/png;base64," + base64.b64encode(min(IMAGES.glob("*.png")).read_bytes()).decode()
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TEXT = {"type": "text", "text": "what shape is in the image?"}
IMAGE = {"type": "image_url", "image_url": {"url": PICTURE}}
USER = {"role": "user", "content": [TEXT, IMAGE]}
SYSTEM = {"role": "system", "content": "Be exact."}
SHAPE = {"properties": {"shape": {"title": "Shape", "type": "string"}}, "required": ["shape"], "title": "Seen"}
SEEN = SHAPE | {"type": "object"}
FUNCTION = {"name": "Seen", "description": "", "parameters": {k: v for k, v in SEEN.items() if k != "title"}}
TOOL = {"type": "function", "function": FUNCTION}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "Seen"}}}
CALL = {"type": "function", "id": "abc123def", "function": {"name": "Seen", "arguments": '{"shape": "circle"}'}}
RESULT = [
    {"content": None, "role": "assistant", "tool_calls": [CALL]},
    {"content": "ok", "role": "tool", "tool_call_id": "abc123def"},
]
NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
LABELS = {
    "type": "object",
    "properties": {
        "labels": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "confidence": NUMBER,
                    "topicality": NUMBER,
                },
                "required": ["name", "confidence", "topicality"],
                "additionalProperties": False,
            },
            "default": [],
        }
    },
    "required": ["labels"],
    "additionalProperties": False,
}


def langchain(**more: Any) -> dict[str, Any]:
    """langchain-openai 1.7.4, `ChatOpenAI(temperature=0, max_tokens=12)`."""
    base = {"messages": [SYSTEM, USER], "model": NAME, "max_completion_tokens": 12, "stream": False}
    return base | {"temperature": 0.0} | more


def form(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "Seen", **more}}


def photoprism(**more: Any) -> dict[str, Any]:
    """PhotoPrism, internal/ai/vision/api_request.go."""
    system = {"role": "system", "type": "message", "content": [{"type": "input_text", "text": "Be exact."}]}
    image = {"type": "input_image", "image_url": PICTURE, "detail": "low"}
    parts = [{"type": "input_text", "text": "Describe it."}, image]
    return {"model": NAME, "input": [system, {"role": "user", "type": "message", "content": parts}]} | more


def sillytavern(**more: Any) -> dict[str, Any]:
    """SillyTavern's source "custom", src/endpoints/backends/chat-completions.js, with the settings it comes with."""
    chat = [{"role": "system", "content": "[Start a new Chat]"}, {"role": "assistant", "content": "Hello."}]
    image = {"type": "image_url", "image_url": {"url": PICTURE, "detail": "auto"}}
    messages = [SYSTEM, *chat, {"role": "user", "content": [TEXT, image]}]
    numbers = {"temperature": 1, "max_tokens": 12, "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1}
    return {"messages": messages, "model": NAME, "stream": True, "logit_bias": {}} | numbers | more


ANSWERED: dict[str, tuple[str, dict[str, Any]]] = {
    "langchain": (CHAT, langchain()),
    "langchain, stream": (CHAT, langchain(stream=True)),
    "langchain, json_schema": (
        CHAT,
        langchain(response_format=form(schema=SEEN | {"additionalProperties": False}, strict=True)),
    ),
    "langchain, json_mode": (CHAT, langchain(response_format={"type": "json_object"})),
    "langchain, function_calling": (CHAT, langchain(parallel_tool_calls=False, **FORCED)),
    "langchain, bind_tools": (CHAT, langchain(tools=[TOOL])),
    "langchain, results of tools": (CHAT, langchain(messages=[SYSTEM, USER, *RESULT])),
    "langchain, Responses API": (
        RESPONSES,
        {
            "input": [
                {"content": "Be exact.", "role": "system", "type": "message"},
                {
                    "content": [
                        {"type": "input_text", "text": "what?"},
                        {"type": "input_image", "image_url": PICTURE},
                    ],
                    "role": "user",
                    "type": "message",
                },
            ],
            "model": NAME,
            "max_output_tokens": 12,
            "stream": False,
        },
    ),
    # litellm 1.110.2, as openai/NAME and hosted_vllm/NAME
    "litellm": (CHAT, {"model": NAME, "messages": [USER], "max_tokens": 12}),
    "litellm, stream": (CHAT, {"model": NAME, "messages": [USER], "stream": True, "max_tokens": 12}),
    "litellm, tools": (
        CHAT,
        {"model": NAME, "messages": [USER], "tools": [TOOL], "tool_choice": "auto", "max_tokens": 12},
    ),
    # instructor 1.17.0 in its modes
    "instructor, TOOLS": (CHAT, {"messages": [USER], "model": NAME, **FORCED}),
    "instructor, JSON": (
        CHAT,
        {
            "messages": [{"role": "system", "content": [{"type": "text", "text": "As a genius expert, …"}]}, USER],
            "model": NAME,
            "response_format": {"type": "json_object"},
        },
    ),
    "instructor, JSON_SCHEMA": (CHAT, {"messages": [USER], "model": NAME, "response_format": form(schema=SEEN)}),
    # Open WebUI: a question, and the title that it asks for afterwards (routers/tasks.py)
    "open-webui": (
        CHAT,
        {"stream": True, "model": NAME, "messages": [USER], "stream_options": {"include_usage": True}},
    ),
    "open-webui, a title": (
        CHAT,
        {"model": NAME, "messages": [{"role": "user", "content": "title?"}], "stream": False}
        | {"max_completion_tokens": 12},
    ),
    "sillytavern": (CHAT, sillytavern()),
    "sillytavern, a caption": (CHAT, {"model": NAME, "messages": [USER]}),  # src/endpoints/openai.js
    "sillytavern, probabilities and stops": (CHAT, sillytavern(logprobs=True, top_logprobs=5, stop=["\nYou:"])),
    "photoprism, a caption": (RESPONSES, photoprism(max_output_tokens=512)),
    "photoprism, labels": (
        RESPONSES,
        photoprism(
            max_output_tokens=40,
            text={"format": {"type": "json_schema", "name": "photoprism_vision_labels_v1", "schema": LABELS}},
        ),
    ),
    # aiperf 0.13.0, endpoints/openai_chat.py and base_endpoint.py
    "aiperf": (
        CHAT,
        {"messages": [USER], "model": NAME, "stream": True, "max_completion_tokens": 12}
        | {"stream_options": {"include_usage": True}},
    ),
    # lmms-eval 0.7.3, models/chat/openai.py
    "lmms-eval": (CHAT, {"messages": [USER], "model": NAME, "max_tokens": 8, "temperature": 0, "n": 1}),
    # vllm bench serve, benchmarks/lib/endpoint_request_func.py
    "vllm": (
        CHAT,
        {"model": NAME, "messages": [USER], "temperature": 0.0, "max_completion_tokens": 12, "stream": True}
        | {"stream_options": {"include_usage": True}},
    ),
    # SGLang's bench_serving with --disable-ignore-eos
    "sglang": (
        CHAT,
        {"model": NAME, "messages": [USER], "temperature": 0.0, "max_completion_tokens": 12, "stream": True}
        | {"ignore_eos": False},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # Mistral's template has no names
    "sillytavern, a named example": (
        CHAT,
        sillytavern(messages=[SYSTEM | {"name": "example_user"}, USER]),
        "messages[0]",
    ),
    "sglang, answers of one length": (CHAT, ANSWERED["sglang"][1] | {"ignore_eos": True}, "ignore_eos"),
    "vllm, answers of one length": (CHAT, ANSWERED["vllm"][1] | {"ignore_eos": True}, "ignore_eos"),
    "aiperf, counts with each piece": (
        CHAT,
        ANSWERED["aiperf"][1] | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    "photoprism, a reasoning model": (RESPONSES, photoprism(reasoning={"effort": "low"}), "reasoning"),
}
THOUGHT = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]}
SENT_BACK: dict[str, dict[str, Any]] = {
    "openai": {"refusal": None},
    "openai, dumped": {"refusal": None, "annotations": None, "audio": None, "function_call": None},
    "openai, of OpenAI's own answer": {"refusal": None, "annotations": []},
    "litellm": {},
}


@pytest.mark.parametrize("client", SENT_BACK)
def test_an_answer_is_taken_back_as_it_came_without_its_thoughts(client: str, server: Served) -> None:
    result = RESULT[1]
    plain = {"messages": [USER, {k: v for k, v in THOUGHT.items() if k != "reasoning_content"}, result]}
    sent = {"messages": [USER, THOUGHT | SENT_BACK[client], result]}
    first, second = (server.post("/tokenize", body).json() for body in (plain, sent))
    assert first["tokens"] == second["tokens"]


@pytest.mark.parametrize("client", ANSWERED)
def test_what_clients_send_is_answered(client: str, server: Served) -> None:
    path, body = ANSWERED[client]
    response = server.post(path, body)
    assert response.is_success, response.text
    assert '"error"' not in response.text.replace('"error":null', "")  # nor in an event of a stream


@pytest.mark.parametrize("client", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_its_field(client: str, server: Served) -> None:
    path, body, field = REFUSED[client]
    response = server.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
