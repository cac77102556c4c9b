"""Answers that are JSON of a schema: at each step only tokens that can still become such JSON may be chosen.

llguidance turns the schema into a grammar over the bytes of the tokenizer's tokens. JSON is written compactly, without
white space between its parts, so that no answer is lost in blanks. What llguidance does not enforce is refused when the
schema is compiled, so a finished answer validates.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pixtral_runtime.errors import InputError, MachineError, extra_missing
from pixtral_runtime.prompt import PromptBuilder

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "lenient": False}


class Schema:
    """A JSON schema, compiled for a bundle's tokens. Each answer gets a constraint of its own."""

    def __init__(self, matcher: LLMatcher, eos: int) -> None:
        self._matcher, self._eos = matcher, eos

    def constraint(self) -> SchemaConstraint:
        return SchemaConstraint(self._matcher.deep_copy(), self._eos)


class SchemaConstraint:
    """A `sampling.Constraint`: where one answer is in its JSON."""

    def __init__(self, matcher: LLMatcher, eos: int) -> None:
        self._matcher, self._eos = matcher, eos

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (V,) with -inf for tokens that the schema forbids. Raises MachineError where it forbids all."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        masked = np.full_like(logits, -np.inf)
        places = np.flatnonzero(allowed[: len(logits)])  # the model may know fewer tokens than the tokenizer, or more
        if not len(places):
            raise MachineError(
                f"no token can go on from here: {self._matcher.get_error() or 'the model lacks the tokens'}",
                "a schema without this property, or of another form",
            )
        masked[places] = logits[places]
        return masked

    def accept(self, token_id: int) -> None:
        """Raises MachineError for a token that the mask forbids."""
        if not self._matcher.consume_token(token_id):
            raise MachineError(
                f"token {token_id} is not of the schema: {self._matcher.get_error()}", "report this as a bug"
            )


def compile_schema(text: str, prompts: PromptBuilder, name: str) -> Schema:
    """Compile the text of a JSON schema. Raises InputError where it is none, or where it cannot be enforced in full."""
    try:
        import llguidance
        from mistral_common.guidance.tokenizer import from_mistral_tokenizer
    except ImportError as error:
        raise extra_missing("llguidance", "schema", "Answering by a JSON schema") from error
    try:
        schema: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}", "--json-schema FILE with a JSON schema") from error
    if not isinstance(schema, dict):
        raise InputError(f"{name} is no JSON schema: expected an object", '{"type": "object", "properties": {…}}')
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)
    tokenizer = from_mistral_tokenizer(prompts.tokenizer)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if failed or messages:
        raise InputError(f"{name} cannot be enforced: {'; '.join(messages)}", "leave that out of the schema")
    return Schema(llguidance.LLMatcher(tokenizer, grammar, log_level=0), prompts.bundle.model.eos)
