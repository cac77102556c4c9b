"""What an answer may call: whatever the model prefers, it calls what it must, as it must, or nothing."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from helpers.bundles import exported
from helpers.family import prompts_of_version
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.errors import MachineError, MissingPackageError, RequestError
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.json_schema import compile_schema
from pixtral_runtime.generation.sampling import Constraint, Sampler, Sampling
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.generation.tool_choice import compile_tools
from pixtral_runtime.inputs.conversation import ToolCall, user_message
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.tools import Tool, Tools

VERSIONS = ["v3", "v7", "v11", "v13"]
EOS, SPECIAL = 2, 32
WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "maxLength": 6}},
    },
    strict=True,
)
NOW = Tool("get", strict=True)  # the beginning of the other's name
LOOSE = Tool("find", parameters=WEATHER.parameters)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return load(exported(DEMO, folder, ExportSettings(dtype="float32")).path)


@pytest.fixture(scope="module")
def builders(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptBuilder]:
    return {
        version: prompts_of_version(model.bundle, tmp_path_factory.mktemp(version), version) for version in VERSIONS
    }


def random_logits(prompts: PromptBuilder, rng: np.random.Generator, liking: float) -> npt.NDArray[np.float32]:
    """Of a model that likes to end, to think and to call."""
    logits = rng.standard_normal(prompts.bundle.model.decoder.vocab_size).astype(np.float32)
    logits[[EOS, prompts.call_tokens.call, *(prompts.think_tokens or ())]] += liking
    return logits


def said(prompts: PromptBuilder, constraint: Constraint | None, seed: int, liking: float = 4) -> list[int]:
    """What a model of random preferences says."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    choose = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed), constraint)
    while len(tokens) < 400 and EOS not in tokens and not (constraint is not None and constraint.is_complete):
        logits = random_logits(prompts, rng, liking)
        if constraint is not None:  # the two ways of asking agree
            allowed = np.isfinite(constraint.mask(logits))
            assert constraint.allows(np.arange(len(logits))).tolist() == allowed.tolist()
        tokens.append(choose(logits))
    return tokens


def check(calls: tuple[ToolCall, ...], tools: Tools) -> None:
    offered = {tool.name: tool for tool in tools.callable}
    assert len(calls) <= 1 or tools.parallel
    for call in calls:
        tool = offered[call.name]
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        if tool.strict:
            jsonschema.validate(arguments, dict(tool.parameters))
            assert tool.parameters or arguments == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_made_every_time(version: str, parallel: bool, builders: dict[str, PromptBuilder]) -> None:
    prompts = builders[version]
    tools = Tools((NOW, WEATHER), "required", parallel=parallel)
    choice, counts, names, thoughts = compile_tools(tools, prompts), set(), set(), 0
    for seed in range(20):
        answer = prompts.read_calling_answer(said(prompts, choice.constraint(), seed))
        assert answer.tool_calls and not answer.is_malformed and answer.text == ""
        check(answer.tool_calls, tools)
        counts.add(len(answer.tool_calls))
        names |= {call.name for call in answer.tool_calls}
        thoughts += answer.thinking is not None
    assert names == {"get", "get_weather"}
    assert (len(counts) > 1) == parallel
    assert (0 < thoughts < 20) == (prompts.think_tokens is not None)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_named_call_is_that_one(version: str, builders: dict[str, PromptBuilder]) -> None:
    tools = Tools((NOW, WEATHER), "required", "get_weather", parallel=False)
    choice = compile_tools(tools, builders[version])
    for seed in range(20):
        calls = builders[version].read_calling_answer(said(builders[version], choice.constraint(), seed)).tool_calls
        assert calls
        check(calls, tools)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_strict_tool_is_called_as_it_says_or_not_at_all(version: str, builders: dict[str, PromptBuilder]) -> None:
    prompts, tools = builders[version], Tools((NOW, WEATHER))
    choice, seen = compile_tools(tools, prompts), set()
    for seed in range(20):
        answer = prompts.read_calling_answer(said(prompts, choice.constraint(), seed))
        assert not answer.is_malformed
        check(answer.tool_calls, tools)
        seen.add((bool(answer.text), bool(answer.tool_calls)))
    assert {(True, True), (True, False)} <= seen


@pytest.mark.parametrize("version", VERSIONS)
def test_none_never_calls(version: str, builders: dict[str, PromptBuilder]) -> None:
    prompts = builders[version]
    choice = compile_tools(Tools((NOW, WEATHER), "none"), prompts)
    free = [prompts.call_tokens.call in said(prompts, None, seed) for seed in range(20)]
    assert any(free)
    for seed in range(20):
        assert prompts.call_tokens.call not in said(prompts, choice.constraint(), seed)


def test_a_tool_that_is_not_strict_takes_any_object(builders: dict[str, PromptBuilder]) -> None:
    prompts, tools = builders["v13"], Tools((LOOSE,), "required", parallel=False)
    constraint: Any = compile_tools(tools, prompts).constraint()
    call, args = prompts.call_tokens.call, prompts.call_tokens.args
    encode = prompts.tokenizer.instruct_tokenizer.tokenizer.encode
    for token in (
        call,
        *encode("find", bos=False, eos=False),
        args,
        *encode('{"a": [1, {}], "b": null}', False, False),
    ):
        constraint.accept(token)
    assert constraint.is_complete


def test_text_that_has_a_schema_may_be_a_call_instead(builders: dict[str, PromptBuilder]) -> None:
    prompts, seen = builders["v11"], set()
    schema = compile_schema('{"enum": ["yes", "no"]}', prompts, "s")
    for tools in (Tools((NOW,)), Tools((Tool("get"),), "none")):
        choice = compile_tools(tools, prompts)
        for seed in range(20):
            answer = prompts.read_calling_answer(said(prompts, choice.constraint(schema), seed, liking=0))
            assert answer.text in ('"yes"', '"no"', "")
            assert bool(answer.text) != bool(answer.tool_calls)
            seen.add((tools.choice, bool(answer.tool_calls)))
    assert seen == {("auto", True), ("auto", False), ("none", False)}
    free = compile_tools(Tools((Tool("get"),)), prompts)
    assert free.constraint() is None
    call_token, constraint = prompts.call_tokens.call, free.constraint(schema)
    assert constraint is not None
    constraint.accept(call_token)
    assert constraint.allows(np.arange(40)).all() and not constraint.is_complete  # calls are free, the text is not


def test_the_demo_checkpoint_calls(model: Model) -> None:
    tools = Tools((NOW, WEATHER), "required")
    choice = compile_tools(tools, model.prompts)
    prompt = model.prompts.build(user_message("is there a circle?"), tools=tools)
    scheduler = Scheduler(model.bundle, model.runner, 4, drafts=2)
    generations = [
        Generation(prompt, 200, Sampling(1.0, 1.0, seed), choice.constraint(), AnswerText(model.prompts, may_call=True))
        for seed in range(8)
    ]
    for generation in generations:
        scheduler.submit(generation)
    while scheduler.busy:
        scheduler.step()
    for generation in generations:
        assert generation.text is not None and (generation.error, generation.finish_reason) == (None, "stop")
        generation.text.finish()
        assert generation.text.tool_calls and not generation.text.pieces
        check(generation.text.tool_calls, tools)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "minProperties": 1},
        {"type": "object", "propertys": {}},
        {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64"}}},
        {"type": "object", "x-guidance": {"lenient": True}},
    ],
)
def test_a_strict_tool_that_cannot_be_enforced_is_refused(
    parameters: dict[str, Any], builders: dict[str, PromptBuilder]
) -> None:
    with pytest.raises(RequestError, match="parameters of f cannot be enforced"):
        compile_tools(Tools((Tool("f", parameters=parameters, strict=True),)), builders["v13"])
    compile_tools(Tools((Tool("f", parameters=parameters),)), builders["v13"])


def test_a_schema_that_no_arguments_fulfil_is_refused(builders: dict[str, PromptBuilder]) -> None:
    never = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    with pytest.raises((RequestError, MachineError), match=r"strict tool|lets no answer"):
        compile_tools(Tools((Tool("f", parameters=never, strict=True),), "required"), builders["v13"])


def test_only_a_choice_that_needs_it_takes_a_package(
    builders: dict[str, PromptBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for tools in (Tools((LOOSE,)), Tools((NOW,), "none"), Tools((NOW, LOOSE), "none", parallel=False)):
        compile_tools(tools, builders["v3"])
    for tools in (
        Tools((LOOSE,), "required"),
        Tools((LOOSE,), "required", "find"),
        Tools((NOW,)),
        Tools((LOOSE,), parallel=False),
    ):
        with pytest.raises(MissingPackageError, match="llguidance") as raised:
            compile_tools(tools, builders["v3"])
        assert "pixtral[schema]" in raised.value.hint
