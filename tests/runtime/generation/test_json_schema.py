"""Answers by a JSON schema: whatever the model prefers, a finished answer is JSON that validates."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from helpers.bundles import exported
from helpers.places import DEMO, IMAGES
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Settings
from pixtral_runtime.errors import InputError, MachineError
from pixtral_runtime.generation.json_schema import JsonSchema, SchemaConstraint, compile_schema
from pixtral_runtime.generation.sampling import Sampler, Sampling
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import open_image

PICTURES = sorted(IMAGES.glob("*.png"))
SPECIAL = 20  # control tokens of the demo checkpoint
WORD = {"type": "string", "maxLength": 8}
RECEIPT = {
    "type": "object",
    "properties": {
        "shop": WORD,
        "total": {"type": "number", "minimum": 0, "maximum": 9999, "multipleOf": 0.5},  # else digits without end
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {"$ref": "#/$defs/item"},
        },
        "paid": {"type": "boolean"},
        "currency": {"enum": ["EUR", "złoty", "¥"]},
    },
    "required": ["shop", "total", "items", "currency"],
    "additionalProperties": False,
    "$defs": {
        "item": {
            "type": "object",
            "properties": {"name": WORD, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: dict[str, Any] = {
    "receipt": RECEIPT,
    "number": {"type": "number", "minimum": -0.25, "exclusiveMaximum": 9999},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "either": {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 20}, {"type": "null"}, {"const": "né"}]},
    "list": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 4},
    "words": {"enum": ["\b\f\n\r\t", '\\"/', "\u2028é", "😀"]},
    "tree": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}},
        "required": ["value"],
        "additionalProperties": False,
    },
    "open": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    "options": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in "abc"},
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return load(exported(DEMO, folder, ExportSettings(dtype="float32")).path)


def compiled(model: Model, schema: object) -> JsonSchema:
    return compile_schema(json.dumps(schema), model.prompts, "schema.json")


def no_preference(model: Model) -> npt.NDArray[np.float32]:
    return np.zeros(model.bundle.model.decoder.vocab_size, np.float32)


def random_answer(model: Model, constraint: SchemaConstraint, seed: int) -> str | None:
    """What a model of random preferences says, None where it found no end in 400 tokens."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    choose = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed), constraint)
    while not constraint.is_complete and len(tokens) < 400:
        tokens.append(choose(rng.standard_normal(model.bundle.model.decoder.vocab_size).astype(np.float32)))
        if tokens[-1] == model.bundle.model.eos:
            return model.prompts.detokenize(tokens)
        assert tokens[-1] >= SPECIAL
    return model.prompts.detokenize(tokens) if constraint.is_complete else None


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_preferences_give_valid_json(model: Model, name: str) -> None:
    schema, answers, cut = compiled(model, SCHEMAS[name]), set(), 0
    for seed in range(50):
        answer = random_answer(model, schema.constraint(), seed)
        if answer is None:
            cut += 1  # in the middle of an endless key or number
            continue
        jsonschema.validate(json.loads(answer), SCHEMAS[name])
        assert not any(blank in answer for blank in ("\n", "\t", '": ', '", '))
        answers.add(answer)
    assert cut <= (25 if name == "open" else 0)
    assert len(answers) > (20 if name == "receipt" else 2)


def test_two_hundred_answers_of_the_demo_checkpoint_validate(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"color": WORD, "shape": WORD, "round": {"type": "boolean"}},
        "required": ["color", "shape"],
        "additionalProperties": False,
    }
    questions = [f"what is shown in the image, {number}?" for number in range(25)]
    requests = requests_of_images(PICTURES, questions, None, 60)
    assert len(requests) == 200
    job = Job(
        model, requests, Settings(model.bundle.fingerprint), JobOptions(8, drafts=2, schema=compiled(model, schema))
    )
    records = list(job.records())
    assert [record.error for record in records] == [None] * 200
    assert {record.finish_reason for record in records} == {"stop"}
    for record in records:
        jsonschema.validate(json.loads(str(record.answer)), schema)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_demo_checkpoint_writes_receipts_of_what_it_never_saw(model: Model, temperature: float) -> None:
    schema = compiled(model, RECEIPT)
    for seed, path in enumerate(PICTURES):
        prompt = model.prompts.build(user_message("Read the receipt.", [open_image(path)]))
        cache = model.runner.sessions.decoder.new_cache(1, 512)
        logits = model.runner.prefill(prompt, model.runner.encode_images(prompt), cache)[-1]
        constraint, tokens = schema.constraint(), list[int]()
        choose = Sampler(Sampling(temperature=temperature, seed=seed), constraint)
        while not constraint.is_complete:
            tokens.append(choose(logits))
            logits = model.runner.decode_token(tokens[-1], len(prompt.token_ids) + len(tokens) - 1, cache)
        jsonschema.validate(json.loads(model.prompts.detokenize(tokens)), RECEIPT)


def test_an_answer_that_is_cut_off_says_so(model: Model) -> None:
    requests = requests_of_images(PICTURES[:1], ["?"], None, 3)
    job = Job(model, requests, Settings(model.bundle.fingerprint), JobOptions(schema=compiled(model, RECEIPT)))
    (record,) = job.records()
    assert (record.finish_reason, record.new_tokens) == ("length", 3)


def test_a_model_with_more_tokens_than_its_tokenizer_never_says_them(model: Model) -> None:
    constraint = compiled(model, {"const": "a"}).constraint()
    logits = np.zeros(model.bundle.model.decoder.vocab_size + 500, np.float32)
    masked = constraint.mask(logits)
    assert masked.shape == logits.shape
    assert np.isneginf(masked[-500:]).all()
    assert np.isfinite(masked).any()


def test_a_model_that_lacks_the_tokens_gets_an_error_not_an_answer(model: Model) -> None:
    with pytest.raises(MachineError, match="no token for what must follow"):
        compiled(model, {"const": "a"}).constraint().mask(np.zeros(SPECIAL, np.float32))


def after(model: Model, schema: object, text: str) -> tuple[SchemaConstraint, npt.NDArray[np.int64]]:
    """Where an answer is that begins with `text`, and the tokens that may follow."""
    constraint = compiled(model, schema).constraint()
    for token in model.prompts.tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False):
        constraint.accept(token)
    return constraint, np.flatnonzero(np.isfinite(constraint.mask(no_preference(model))))


def test_the_end_is_allowed_where_the_json_is_whole_and_nowhere_else(model: Model) -> None:
    eos = model.bundle.model.eos
    for schema, text, may_end, is_complete in (
        ({"type": "integer"}, "", False, False),
        ({"type": "integer"}, "-", False, False),
        ({"type": "integer"}, "12", True, False),
        ({"type": "string"}, '"a', False, False),
        ({"type": "string"}, '"a"', True, True),
        ({"type": "array"}, "[1", False, False),
        ({"type": "array"}, "[1]", True, True),
    ):
        constraint, tokens = after(model, schema, text)
        assert ((eos in tokens), constraint.is_complete) == (may_end, is_complete), text
        assert not set(tokens.tolist()) & (set(range(SPECIAL)) - {eos})
        if may_end:
            constraint.accept(eos)
            assert constraint.is_complete


def test_a_forbidden_token_is_an_error(model: Model) -> None:
    constraint, _ = after(model, {"type": "integer"}, "1")
    with pytest.raises(MachineError, match="lets no answer go on"):
        constraint.accept(3)
    assert not constraint.is_complete


def test_a_dead_end_is_an_error_not_an_answer(model: Model) -> None:
    endless = {"$ref": "#/$defs/endless"}
    schema = {
        "type": "object",
        "properties": {"a": endless},
        "additionalProperties": False,
        "$defs": {"endless": endless},
    }
    with pytest.raises(MachineError, match="lets no answer go on"):
        after(model, schema, '{"a":')
    with pytest.raises(MachineError, match="lets no answer go on"):
        compiled(model, endless | {"$defs": {"endless": endless}})


def test_an_escaped_name_is_no_way_around_a_property(model: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    after(model, schema, '{"a":null,"b":3}')
    for name in ("a", "\\u0061"):
        with pytest.raises(MachineError):
            after(model, schema, f'{{"a":null,"{name}":3}}')


def test_answers_of_one_schema_do_not_share_their_place(model: Model) -> None:
    schema = compiled(model, {"enum": ["a", "b"]})
    one, other = schema.constraint(), schema.constraint()
    before = other.mask(no_preference(model))
    one.accept(int(np.isfinite(before).argmax()))
    np.testing.assert_array_equal(other.mask(np.zeros_like(before)), before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ('{"minimum": NaN}', "NaN"),
        ("[" * 200_000, "recursion"),
        ("[1]", "expected an object"),
        ('{"type": "object", "properties": {"a": {"type": "null"}, "a": {}}}', "the key 'a' is there twice"),
        ('{"type": "objekt"}', "objekt"),
        ('{"type": "object", "properties": {"a": {"maxlength": 3}}}', "$.properties.a: unknown keyword 'maxlength'"),
        ('{"type": "object", "requried": ["a"]}', "requried"),
        ('{"type": "string", "nullable": true}', "nullable"),
        ('{"type": "string", "minLength": "3"}', "minLength"),
        ('{"type": "array", "items": [{"type": "null"}]}', "$.items"),
        ('{"type": "string", "contentEncoding": "base64"}', "base64"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"type": "array", "contains": {"type": "null"}}', "contains"),
        ('{"type": "object", "minProperties": 2}', "$.minProperties"),
        ('{"if": {"type": "null"}, "then": {"const": 1}}', "then"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ('{"type": "null", "x-guidance": {"lenient": true}}', "x-guidance"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "string", "format": "poem"}', "poem"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "string", "pattern": "("}', "unclosed"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ('{"type": "integer", "maximum": 9007199254740993}', "9007199254740993"),
        ('{"type": "integer", "maximum": 9007199254740993.0}', "9007199254740993.0"),
        ('{"const": 1e30}', "1e30"),
        ('{"const": "a\\u0001"}', "control characters"),
        ('{"enum": ["\\ud800"]}', "control characters"),
        ('{"$ref": "https://example.com/x"}', "example.com"),
    ],
)
def test_what_cannot_be_enforced_is_refused(model: Model, text: str, words: str) -> None:
    with pytest.raises(InputError, match=r"schema\.json") as raised:
        compile_schema(text, model.prompts, "schema.json")
    assert words in str(raised.value)


@pytest.mark.parametrize("depth", [25, 5000])
def test_a_deep_schema_is_checked_at_once_or_refused(model: Model, depth: int) -> None:
    text = '{"type":"object","properties":{"a":' * depth + '{"type":"null","requried":[]}' + "}}" * depth
    with pytest.raises(InputError, match="unknown keyword 'requried'" if depth < 100 else "deep|recursion"):
        compile_schema(text, model.prompts, "schema.json")


def test_notes_in_a_schema_are_no_hindrance(model: Model) -> None:
    notes = {"title": "T", "description": "d", "default": None, "examples": [1], "x-order": 3, "deprecated": True}
    draft7 = "http://json-schema.org/draft-07/schema#"
    _, tokens = after(model, {"$schema": draft7, "type": "null", **notes}, "null")
    assert tokens.tolist() == [model.bundle.model.eos]


def test_a_missing_package_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError, match="llguidance") as raised:
        compiled(model, {})
    assert "pixtral[schema]" in raised.value.hint
