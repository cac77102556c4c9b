"""Tools in prompts and answers: what mistral-common writes is what the model reads, and what it answers comes back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from helpers.bundles import exported
from helpers.family import prompts_of_version
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Message
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import ContextError, RequestError
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.inputs.conversation import ToolCall, check_tool_results
from pixtral_runtime.inputs.openai_messages import local_picture, parse_message
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.tool_calls import model_id
from pixtral_runtime.inputs.tools import Tool, Tools, parse_tools

VERSIONS = ["v3", "v7", "v11", "v13"]
EOS = 2
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where, e.g. Łódź"}, "unit": {"enum": ["°C", "K"]}},
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of today", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def function(**changes: object) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | changes}]


def calling(*calls: tuple[str, str, str], content: object = None) -> dict[str, Any]:
    """An assistant's message with calls of these ids, names and arguments."""
    written = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": written}


def result(id: str, content: object) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


QUESTION = {"role": "user", "content": "Weather?"}
ONE = calling(("VvvODy9mT", "get_weather", '{"city": "Łódź",  "unit":"K"}'))
TWO = calling(("aaaaaaaa1", "get_weather", '{"city": "Paris"}'), ("aaaaaaaa2", "now", "{}"))
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "no call": [{"role": "system", "content": "Be nice."}, QUESTION],
    "one result": [{"role": "system", "content": "Be nice."}, QUESTION, ONE, result("VvvODy9mT", "22")],
    "two results": [QUESTION, TWO, result("aaaaaaaa1", '{"celsius": 22}'), result("aaaaaaaa2", "noon")],
    "in parts": [QUESTION, ONE, result("VvvODy9mT", [{"type": "text", "text": t} for t in ("warm", "wet")])],
    "an empty result": [QUESTION, ONE, result("VvvODy9mT", "")],
    "next turn": [QUESTION, ONE, result("VvvODy9mT", "22"), {"role": "assistant", "content": "Cold."}, QUESTION],
}  # fmt: skip


def messages_of(conversation: list[dict[str, Any]]) -> list[Message]:
    return [parse_message(message, local_picture(Path())) for message in conversation]


def ids_of(prompts: PromptBuilder, text: str) -> list[int]:
    """Tokens of a text in which control tokens are written by their names."""
    tokens: Any = prompts.tokenizer.instruct_tokenizer.tokenizer
    parts = re.split(r"(\[[A-Z_/]+\])", text)
    return [
        id
        for part in parts
        for id in (
            [tokens.get_special_token(part)]
            if re.fullmatch(r"\[[A-Z_/]+\]", part)
            else tokens.encode(part, bos=False, eos=False)
        )
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tools") / "b"
    return exported(DEMO, folder, ExportSettings(dtype="float32"))


@pytest.fixture(scope="module")
def builders(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptBuilder]:
    return {version: prompts_of_version(bundle, tmp_path_factory.mktemp(version), version) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_mistral_commons(name: str, version: str, builders: dict[str, PromptBuilder]) -> None:
    prompts, conversation = builders[version], CONVERSATIONS[name]
    reference = MistralTokenizer.from_file(str(prompts.bundle.tokenizer_path))
    for tools in (None, TOOLS):
        request: Any = ChatCompletionRequest.from_openai(conversation, tools=tools)
        expected = reference.encode_chat_completion(request).tokens
        assert prompts.build(messages_of(conversation), tools=parse_tools(tools)).token_ids.tolist() == expected
        assert (prompts.call_tokens.call in expected) == (name not in ("no call",))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_id_from_elsewhere_is_the_same_valid_one_every_time(
    version: str, builders: dict[str, PromptBuilder]
) -> None:
    prompts = builders[version]
    theirs = [
        QUESTION,
        calling(("call_abc", "now", ""), ("null", "now", "{}")),
        *map(result, ("call_abc", "null"), "ab"),
    ]
    mapped = [model_id("call_abc"), model_id("null")]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", id) for id in mapped) and len(set(mapped)) == 2
    ours = [QUESTION, calling(*((id, "now", "{}") for id in mapped)), *map(result, mapped, "ab")]
    built = [prompts.build(messages_of(one), tools=parse_tools(TOOLS)).token_ids.tolist() for one in (theirs, ours)]
    assert built[0] == built[1]
    assert model_id("VvvODy9mT") == "VvvODy9mT"


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_come_back_as_they_were_written(version: str, builders: dict[str, PromptBuilder]) -> None:
    prompts = builders[version]
    for message, results in ((ONE, ["VvvODy9mT"]), (TWO, ["aaaaaaaa1", "aaaaaaaa2"])):
        ids = prompts.build(messages_of([QUESTION, message, *(result(id, "x") for id in results)])).token_ids.tolist()
        start = ids.index(prompts.call_tokens.call)
        answer = prompts.read_calling_answer(ids[start : ids.index(EOS, start) + 1])
        assert (answer.text, answer.thinking, answer.is_malformed) == ("", None, False)
        expected = messages_of([message])[0].tool_calls
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
            (call.name, json.loads(call.arguments)) for call in expected
        ]
        made = [call.id for call in answer.tool_calls]
        if version == "v13":  # which writes none
            assert all(re.fullmatch("[A-Za-z0-9]{9}", id) for id in made) and len(set(made)) == len(made)
        else:
            assert made == results


def read_both(prompts: PromptBuilder, ids: list[int]) -> tuple[str, tuple[ToolCall, ...], bool]:
    """What an answer is, read whole and while it comes."""
    answer, text = prompts.read_calling_answer([*ids, EOS]), AnswerText(prompts, may_call=True)
    for id in ids:
        text.push(id)
        assert not text.tool_calls
    text.finish()
    streamed = "".join(piece.text for piece in text.pieces if not piece.is_thinking)
    assert (streamed, len(text.tool_calls), text.is_malformed) == (
        answer.text,
        len(answer.tool_calls),
        answer.is_malformed,
    )
    return answer.text, answer.tool_calls, answer.is_malformed


@pytest.mark.parametrize(
    ("version", "written", "text"),
    [
        ("v3", '[TOOL_CALLS] [{"name": "now", "arguments": {}}]', ""),
        ("v7", 'Let me see.[TOOL_CALLS][{"arguments": {}, "name": "now"}]', "Let me see."),
        ("v11", "Well.[TOOL_CALLS]now[ARGS]{}", "Well."),
        ("v11", "[TOOL_CALLS]now[CALL_ID]short[ARGS]{}", ""),
        ("v11", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', ""),
        ("v13", "[TOOL_CALLS] now [ARGS] {} ", ""),
        ("v13", "[THINK]Hm.[/THINK]So.[TOOL_CALLS]now[ARGS]{}", "So."),
        ("v13", "[THINK]Hm[TOOL_CALLS]now[ARGS]{}", ""),
    ],
)
def test_a_call_is_no_text(version: str, written: str, text: str, builders: dict[str, PromptBuilder]) -> None:
    said, calls, is_malformed = read_both(builders[version], ids_of(builders[version], written))
    assert (said, is_malformed) == (text, False)
    assert [(call.name, call.arguments) for call in calls] == [("now", "{}")]
    assert re.fullmatch("[A-Za-z0-9]{9}", calls[0].id)


@pytest.mark.parametrize(
    ("version", "written"),
    [
        ("v3", '[{"name": "now", "arguments": {}'),
        ("v3", '{"name": "now", "arguments": {}}'),
        ("v3", '[{"name": "now", "arguments": "{}"}]'),
        ("v3", '[{"name": "no w", "arguments": {}}]'),
        ("v3", '[{"name": "now", "arguments": {"a": NaN}}]'),
        ("v3", '[{"name": "now", "arguments": {"a": 1e999}}]'),
        ("v3", '[{"name": "now", "arguments": {"a": "\\ud800"}}]'),
        ("v3", '[{"name": "now", "arguments": {"a": 1, "a": 2}}]'),
        ("v3", '[{"name": ["now"], "arguments": {}}]'),
        ("v3", "[1]"),
        ("v3", "[]"),
        ("v3", ""),
        ("v3", "[" * 3000),
        ("v3", "[" + "9" * 5000),
        ("v11", "now"),
        ("v11", "now[ARGS]"),
        ("v11", "now[ARGS]{} then"),
        ("v11", "now[ARGS]{}[TOOL_CALLS]now[ARGS]{"),
        ("v11", "[CALL_ID]aaaaaaaaa[ARGS]{}"),
        ("v13", "now[ARGS][]"),
    ],
)
def test_a_malformed_call_stays_text(version: str, written: str, builders: dict[str, PromptBuilder]) -> None:
    prompts = builders[version]
    said, calls, is_malformed = read_both(prompts, ids_of(prompts, "So: [TOOL_CALLS]" + written))
    assert (calls, is_malformed) == ((), True)
    assert said == "So: " + re.sub(r"\[[A-Z_]{4,}\]", "", written)


def test_calls_of_one_answer_have_ids_of_their_own(builders: dict[str, PromptBuilder]) -> None:
    call = {"name": "now", "arguments": {}, "id": "aaaaaaaaa"}
    written = "[TOOL_CALLS]" + json.dumps([call, call])
    calls = builders["v3"].read_calling_answer(ids_of(builders["v3"], written)).tool_calls
    assert calls[0].id == "aaaaaaaaa" != calls[1].id


def test_without_tools_an_answer_is_text_as_before(builders: dict[str, PromptBuilder]) -> None:
    ids = ids_of(builders["v13"], "So.[TOOL_CALLS]now[ARGS]{}")
    text = AnswerText(builders["v13"])
    for id in ids:
        text.push(id)
    text.finish()
    assert "".join(piece.text for piece in text.pieces) == "So.now{}" == builders["v13"].read_answer(ids)[0]


def test_stop_strings_are_for_text_and_not_for_calls(builders: dict[str, PromptBuilder]) -> None:
    text = AnswerText(builders["v13"], ("now", ".x"), may_call=True)
    for id in ids_of(builders["v13"], "So.[TOOL_CALLS]now[ARGS]{}"):
        text.push(id)
        assert not text.is_stopped
    text.finish()
    assert "".join(piece.text for piece in text.pieces) == "So." and text.tool_calls[0].name == "now"
    text.begin_again()
    assert text.tool_calls == ()


def test_tools_are_read() -> None:
    tools = parse_tools(TOOLS)
    assert tools == Tools((Tool("get_weather", "Of today", PARAMETERS), Tool("now")))
    null = function(description=None, parameters=None, strict=None)
    assert parse_tools(null, "none", False) == Tools((Tool("f"),), "none", None, parallel=False)
    named = parse_tools(TOOLS, {"type": "function", "function": {"name": "now"}}, True)
    assert named is not None and named.callable == (Tool("now"),) and len(named.tools) == 2
    assert parse_tools(None) is parse_tools([], "auto", True) is parse_tools(None, "none") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({},), "tools: expected a list"),
        (([3],), 'expected objects of the type "function"'),
        (([{"type": "web_search"}],), 'expected objects of the type "function"'),
        (([{"type": "function", "name": "f"}],), "unknown key 'name'"),
        (([{"type": "function"}],), "function: expected an object"),
        ((function(extra=1),), "unknown key 'extra'"),
        ((function(name="a b"),), "1 to 64 letters"),
        ((function(name="f" * 65),), "1 to 64 letters"),
        ((function(name="f\n"),), "1 to 64 letters"),
        ((function(name=None),), "1 to 64 letters"),
        ((function(description=3),), "description: expected a string"),
        ((function(strict=1),), "strict: expected a boolean"),
        ((function(parameters=[]),), "parameters: expected an object"),
        ((function(parameters={"type": "string"}),), "parameters of f are no JSON schema of an object"),
        ((function(parameters={"properties": {}}),), "parameters of f are no JSON schema of an object"),
        ((function(parameters={"type": "object", "required": "a"}),), "parameters of f are no JSON schema: 'a'"),
        ((function() * 2,), "two have the name 'f'"),
        ((TOOLS, "any"), "tool_choice: expected one of none, auto, required"),
        ((TOOLS, {"type": "function"}), "function: expected an object"),
        ((TOOLS, {"type": "function", "function": {"name": "g"}}), "no tool has the name 'g'"),
        ((TOOLS, {"type": "function", "name": "now"}), "unknown key 'name'"),
        ((None, {"type": "function", "function": {"name": "g"}}), "no tool has the name 'g'"),
        ((None, "required"), "there are no tools"),
        ((TOOLS, "auto", 1), "parallel_tool_calls: expected a boolean"),
    ],
)
def test_tools_that_cannot_be_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as raised:
        parse_tools(*arguments)
    assert raised.value.hint


def test_messages_with_tools_are_read() -> None:
    assert messages_of([ONE | {"refusal": None}]) == [
        Message("assistant", (), (ToolCall("VvvODy9mT", "get_weather", '{"city": "Łódź",  "unit":"K"}'),))
    ]
    assert messages_of([calling(("a", "now", ""), content="So.")]) == [
        Message("assistant", ("So.",), (ToolCall("a", "now", "{}"),))
    ]
    assert messages_of([result("a", "22") | {"name": "now"}]) == [Message("tool", ("22",), tool_call_id="a")]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "content: expected a string or a list"),
        ({"role": "assistant", "tool_calls": []}, "content: expected a string or a list"),
        ({"role": "user", "content": "a", "tool_calls": []}, "unknown key 'tool_calls'"),
        ({"role": "user", "content": "a", "tool_call_id": "a"}, "unknown key 'tool_call_id'"),
        ({"role": "tool", "content": "a"}, "tool_call_id: expected a string"),
        ({"role": "tool", "tool_call_id": "a"}, "content: expected a string or a list"),
        (result("a", [{"type": "image", "path": "a.png"}]), "an image in a message of the tool"),
        ({"role": "assistant", "tool_calls": ["now"]}, "tool_calls: expected objects"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}, 'type: expected "function"'),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}, "function: expected an object"),
        (calling((3, "now", "{}")), "id: expected a string"),  # type: ignore[arg-type]
        (calling(("a", "no w", "{}")), "1 to 64 letters"),
        (calling(("a", "now", "[]")), "arguments: expected the text of a JSON object"),
        (calling(("a", "now", "{")), "arguments: expected the text of a JSON object"),
        (calling(("a", "now", "[" * 100_000)), "arguments: expected the text of a JSON object"),
        (calling(("a", "now", {})), "arguments: expected a string"),  # type: ignore[arg-type]
    ],
)
def test_messages_that_cannot_be_are_refused(message: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as raised:
        messages_of([message])
    assert raised.value.hint


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([QUESTION, ONE], "'VvvODy9mT' has no result"),
        ([QUESTION, ONE, QUESTION], "'VvvODy9mT' has no result"),
        ([QUESTION, TWO, result("aaaaaaaa1", "a"), QUESTION], "'aaaaaaaa2' has no result"),
        ([QUESTION, ONE, result("x", "a")], "'x', which no call"),
        ([QUESTION, ONE, result("VvvODy9mT", "a"), result("VvvODy9mT", "a")], "'VvvODy9mT', which no call"),
        ([QUESTION, result("x", "a")], "'x', which no call"),
        ([QUESTION, calling(("a", "now", ""), ("a", "now", "")), result("a", "b")], "the same id"),
    ],
)
def test_calls_and_results_are_pairs(
    conversation: list[dict[str, Any]], words: str, builders: dict[str, PromptBuilder]
) -> None:
    with pytest.raises(RequestError, match=words):
        builders["v13"].build(messages_of(conversation))


def test_only_assistants_call() -> None:
    with pytest.raises(RequestError, match="role user"):
        check_tool_results([Message("user", ("a",), (ToolCall("a", "now", "{}"),))])


def test_text_beside_calls_is_for_newer_models(builders: dict[str, PromptBuilder]) -> None:
    conversation = messages_of([QUESTION, ONE | {"content": "So."}, result("VvvODy9mT", "22")])
    with pytest.raises(RequestError, match="not both") as raised:
        builders["v3"].build(conversation)
    assert "leave away the text" in raised.value.hint
    assert "So." in builders["v7"].detokenize(builders["v7"].build(conversation).token_ids.tolist())


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 2500])
def test_a_result_that_mistral_common_cannot_read_is_refused(text: str, builders: dict[str, PromptBuilder]) -> None:
    conversation = messages_of([QUESTION, ONE, result("VvvODy9mT", text)])
    with pytest.raises(RequestError, match="cannot be used"):
        builders["v3"].build(conversation)


def test_tools_count_for_the_context(builders: dict[str, PromptBuilder]) -> None:
    for description, error in (("a" * 9_000_000, ContextError), ("\ud800", RequestError)):
        with pytest.raises(error):
            builders["v3"].build(messages_of([QUESTION]), tools=Tools((Tool("f", description),)))


def test_what_is_called_is_part_of_what_is_asked() -> None:
    def asked(*conversation: dict[str, Any]) -> str:
        return Request("1", tuple(messages_of(list(conversation)))).asked(Settings("b"))

    base = (QUESTION, ONE, result("VvvODy9mT", "22"))
    others = [
        (QUESTION, ONE | {"tool_calls": TWO["tool_calls"]}, result("VvvODy9mT", "22")),
        (QUESTION, ONE | {"tool_calls": None, "content": ""}, result("VvvODy9mT", "22")),
        (QUESTION, ONE, result("other", "22")),
        (QUESTION, ONE, result("VvvODy9mT", "23")),
    ]
    assert len({asked(*base), *(asked(*other) for other in others)}) == 5
    assert asked(QUESTION) == "e9d9d12bd665483f"  # as before there were tools
