"""Answers that are JSON of a schema: at each step only tokens that can still become such JSON may be chosen.

llguidance turns the schema into a grammar over the bytes of the tokenizer's tokens. JSON is written compactly, without
white space between its parts, so that no answer is lost in blanks. What llguidance ignores is refused when the schema
is compiled, so a finished answer validates. (By exact decimals: Python's jsonschema divides floats, and takes 1.13 for
no multiple of 0.01.)
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import numpy as np
import numpy.typing as npt

from pixtral_runtime.bundle.manifest import SENTENCEPIECE
from pixtral_runtime.errors import MachineError, Option, Remedy, RequestError, SettingError, extra_missing
from pixtral_runtime.inputs.openai_chat import FieldError
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.text_file import unique_keys

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# No \u among the escapes: "\u0061" would be a second property "a" that the grammar takes for another.
COMPACT_JSON: Any = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
    "json_allowed_escapes": 'bfnrt\\"',
}
MOST_SCHEMAS = 64  # compiled ones that are kept
LARGEST_EXACT_INTEGER = 2**53  # llguidance reads numbers as float64, which holds every integer up to here
# llguidance does nothing for the first three, and fulfils minProperties with the same property twice.
IGNORED_KEYWORDS = ("contentEncoding", "contentMediaType", "contentSchema", "minProperties")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
KEYWORD_PATTERN = "x-(?!guidance$)"  # of notes, beside the keywords of the dialect


class JsonSchema:
    """A JSON schema or another grammar, compiled for a bundle's tokens. Each answer gets a constraint of its own.

    `name` and `remedies` are for the error where no answer can go on.
    """

    def __init__(self, matcher: LLMatcher, eos: int, name: str, *remedies: Remedy) -> None:
        self._matcher, self._eos, self._name, self._remedies = matcher, eos, name, remedies

    def constraint(self) -> SchemaConstraint:
        return SchemaConstraint(self._matcher.deep_copy(), self._eos, self._name, *self._remedies)


class SchemaConstraint:
    """A `sampling.Constraint`: where one answer is in its JSON."""

    def __init__(self, matcher: LLMatcher, eos: int, name: str, *remedies: Remedy) -> None:
        self._matcher, self._eos, self._name, self._remedies = matcher, eos, name, remedies

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (V,) with -inf for tokens that the schema forbids. Raises MachineError where it forbids all."""
        allowed = self._allowed(len(logits))
        if not allowed.any():
            raise self._stuck("the model has no token for what must follow")
        return np.where(allowed, logits, np.float32(-np.inf))

    def allows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return self._allowed(max(int(ids.max()), self._eos) + 1)[ids]

    def _allowed(self, size: int) -> npt.NDArray[np.bool_]:
        """Of the first `size` tokens."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        # The model may know fewer tokens than the tokenizer, or more, which stay forbidden.
        allowed = np.unpackbits(bits, count=size, bitorder="little").view(bool)
        if not self._matcher.is_accepting():
            allowed[self._eos] = False  # in a dead end llguidance would end the answer
        return allowed

    def accept(self, token_id: int) -> None:
        """Raises MachineError for a token that the mask forbids, and where the schema is too complex to go on."""
        if not self._matcher.consume_token(token_id):
            raise self._stuck(f"token {token_id} is forbidden")

    def _stuck(self, reason: str) -> MachineError:
        reason = self._matcher.get_error().partition("\n")[0] or reason
        return MachineError(f"{self._name} lets no answer go on here: {reason}", *self._remedies)


def compile_schema(text: str, prompts: PromptBuilder, name: str) -> JsonSchema:
    """Compile the text of a JSON schema of draft 2020-12.

    `name` is what errors call it. Raises RequestError where the text is no schema or cannot be enforced in full, and
    MachineError where llguidance is missing or no answer can begin.
    """
    check_compiler(prompts, "Answering by a JSON schema", "ask for JSON in the prompt, and check the answers")
    import llguidance

    check_schema(text, name)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=COMPACT_JSON)
    return compile_grammar(grammar, prompts, name, "the JSON schema", Option("json_schema", "SIMPLER"))


def check_compiler(prompts: PromptBuilder, purpose: str, *remedies: Remedy) -> None:
    """Raises MissingPackageError without llguidance, and SettingError for a tokenizer that it cannot read."""
    if find_spec("llguidance") is None:
        raise extra_missing("llguidance", "schema", purpose)
    if prompts.bundle.tokenizer_name == SENTENCEPIECE:
        raise SettingError(f"{purpose} needs a tekken tokenizer, and this model has a SentencePiece one", *remedies)


def compile_grammar(
    grammar: str, prompts: PromptBuilder, name: str, stuck_name: str, *stuck_remedies: Remedy
) -> JsonSchema:
    """Compile a grammar of llguidance's, which was made from schemas that were checked.

    `name` is what errors call it now, `stuck_name` where an answer cannot go on. Raises as `compile_schema`.
    """
    import llguidance

    tokenizer, limits = _tokenizer(prompts), llguidance.LLParserLimits(verbose_errors=False)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
    if failed or messages:
        raise RequestError(f"{name} cannot be enforced: {'; '.join(messages)}", "leave that out of the schema")
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    compiled = JsonSchema(matcher, prompts.bundle.model.eos, stuck_name, *stuck_remedies)
    compiled.constraint().mask(np.zeros(prompts.bundle.model.decoder.vocab_size, np.float32))  # can an answer begin?
    return compiled


@lru_cache(maxsize=1)
def _tokenizer(prompts: PromptBuilder) -> LLTokenizer:
    """Kept for the next grammar: it takes two seconds to make, a grammar some milliseconds."""
    import llguidance
    from mistral_common.guidance.tokenizer import MistralLLGTokenizer

    tokens = MistralLLGTokenizer(prompts.tokenizer.instruct_tokenizer.tokenizer)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=prompts.bundle.model.eos)


class SchemaCache:
    """The schemas of requests, each compiled once for as long as it is asked for. May be used by many threads."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._schemas: OrderedDict[str, JsonSchema] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, text: str) -> JsonSchema:
        """Raises FieldError for a schema that cannot be enforced, and what else `compile_schema` raises."""
        with self._lock:
            if text not in self._schemas:
                try:
                    self._schemas[text] = compile_schema(text, self._prompts, "the schema")
                except RequestError as error:
                    raise FieldError("response_format", str(error), "leave that out of it") from error
            self._schemas.move_to_end(text)
            while len(self._schemas) > MOST_SCHEMAS:
                self._schemas.popitem(last=False)
            return self._schemas[text]


@cache
def _enforceable() -> Any:
    """What a schema may say, as a schema: the keywords of its dialect and notes, no misspelt and no ignored keywords.

    Not by `unevaluatedProperties`, which takes twice the time for every level of nesting.
    """
    from jsonschema_specifications import REGISTRY

    dialect: Any = REGISTRY.contents(DIALECT)
    known = set(dialect["properties"])
    for vocabulary in dialect["allOf"]:
        contents: Any = REGISTRY.contents(urljoin(DIALECT, vocabulary["$ref"]))
        known |= set(contents["properties"])
    return {
        "$schema": DIALECT,
        "$id": "urn:pixtral:enforceable",
        "$dynamicAnchor": "meta",
        "$ref": DIALECT,
        "properties": {keyword: {"not": {}} for keyword in IGNORED_KEYWORDS},
        "propertyNames": {"anyOf": [{"enum": sorted(known)}, {"pattern": f"^{KEYWORD_PATTERN}"}]},
    }


def check_schema(text: str, name: str) -> None:
    """Raises RequestError unless the text is a schema of keywords that can be enforced."""
    from jsonschema import Draft202012Validator

    def number(digits: str) -> float:
        value = float(digits)
        if abs(value) >= LARGEST_EXACT_INTEGER:
            raise RequestError(f"{name} cannot be enforced: {digits} is beyond ±2^53", "a smaller number")
        return int(digits) if value.is_integer() and digits.lstrip("-").isdecimal() else value

    def no_number(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        schema: Any = json.loads(
            text, parse_int=number, parse_float=number, parse_constant=no_number, object_pairs_hook=unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON: {error}", Option("json_schema", "FILE")) from error
    if not isinstance(schema, dict):
        raise RequestError(f"{name} is no JSON schema: expected an object", '{"type": "object", "properties": {…}}')
    written = json.dumps(schema, ensure_ascii=False).replace("\\\\", "")
    if re.search(r"\\u|[\x7f\ud800-\udfff]", written):  # llguidance would leave them out, or fail
        raise RequestError(f"{name} cannot be enforced: it has control characters", "leave them out of the schema")
    try:
        errors = list(Draft202012Validator(_enforceable()).iter_errors(schema))
    except RecursionError as error:
        raise RequestError(f"{name} is nested too deeply", "leave levels out of the schema") from error
    if errors:  # those further out only say that there is one further in
        worst = max(errors, key=lambda error: len(error.absolute_path))
        is_unknown = "propertyNames" in worst.absolute_schema_path
        what = f"unknown keyword {worst.instance!r}" if is_unknown else worst.message
        raise RequestError(f"{name} cannot be enforced: {worst.json_path}: {what}", "leave that out of the schema")
