"""Answers by a JSON schema: whatever the model prefers, a finished answer is JSON that validates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from bundles import DEMO, exported
from pixtral_export.export import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.errors import InputError, MachineError
from pixtral_runtime.job import Job, JobOptions
from pixtral_runtime.records import Settings
from pixtral_runtime.requests import requests_of_images
from pixtral_runtime.sampling import Sampler, Sampling
from pixtral_runtime.structured import Schema, SchemaConstraint, compile_schema

IMAGES = sorted((Path(__file__).parent / "data" / "images").glob("*.png"))
WORD = {"type": "string", "maxLength": 8}
RECEIPT = {
    "type": "object",
    "properties": {
        "shop": WORD,
        "total": {"type": "number", "minimum": 0, "maximum": 9999},
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
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "either": {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 20}, {"type": "null"}, {"const": "né"}]},
    "list": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 4},
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


def compiled(model: Model, schema: object) -> Schema:
    return compile_schema(json.dumps(schema), model.prompts, "schema.json")


def random_answer(model: Model, constraint: SchemaConstraint, seed: int) -> str | None:
    """What a model of random preferences says, None where it found no end in 400 tokens."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    choose = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed), constraint)
    while not constraint.is_complete and len(tokens) < 400:
        tokens.append(choose(rng.standard_normal(model.bundle.model.decoder.vocab_size).astype(np.float32)))
        if tokens[-1] == model.bundle.model.eos:
            return model.prompts.decode(tokens)
        assert tokens[-1] >= 20  # no control tokens inside
    return model.prompts.decode(tokens) if constraint.is_complete else None


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_preferences_give_valid_json(model: Model, name: str) -> None:
    schema, answers = compiled(model, SCHEMAS[name]), set()
    for seed in range(30):
        answer = random_answer(model, schema.constraint(), seed)
        assert answer is not None
        jsonschema.validate(json.loads(answer), SCHEMAS[name])
        assert not any(blank in answer for blank in ("\n", "\t", '": ', '", '))
        answers.add(answer)
    assert len(answers) > (20 if name == "receipt" else 2)


def test_two_hundred_answers_of_the_demo_checkpoint_validate(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"color": WORD, "shape": WORD, "round": {"type": "boolean"}},
        "required": ["color", "shape"],
        "additionalProperties": False,
    }
    questions = [f"what is shown in the image, {number}?" for number in range(25)]
    requests = requests_of_images(IMAGES, questions, None, 60)
    assert len(requests) == 200
    job = Job(
        model, requests, Settings(model.bundle.fingerprint), JobOptions(8, drafts=2, schema=compiled(model, schema))
    )
    records = list(job.records())
    assert [record.error for record in records] == [None] * 200
    assert {record.finish_reason for record in records} == {"stop"}
    for record in records:
        jsonschema.validate(json.loads(str(record.answer)), schema)


def test_an_answer_that_is_cut_off_says_so(model: Model) -> None:
    requests = requests_of_images(IMAGES[:1], ["?"], None, 3)
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
    with pytest.raises(MachineError, match="no token can go on"):
        compiled(model, {"const": "a"}).constraint().mask(np.zeros(20, np.float32))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"type": "objekt"}', "objekt"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "string", "format": "poem"}', "poem"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"$ref": "https://example.com/x"}', "example.com"),
    ],
)
def test_what_cannot_be_enforced_is_refused(model: Model, text: str, words: str) -> None:
    with pytest.raises(InputError, match=r"schema\.json") as raised:
        compile_schema(text, model.prompts, "schema.json")
    assert words in str(raised.value)
