"""Tasks whose texts a model reads without writing an answer: what it thinks of four letters, or of every token.

A record is made of each request all the same, so that such a task is shown, kept and resumed like any other: its answer
is the letter, or the numbers as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import KVCache
from pixtral_runtime.batch.item_requests import Requests
from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Record, Request, Settings, record_key, record_of
from pixtral_runtime.batch.results_file import check_same_question
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.errors import BundleError, ContextError, InputError
from pixtral_runtime.evaluation.task import Example, Task
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.text_reading import last_logits, text_nats
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.text_windows import Text, text_windows, window_size

LETTERS = "ABCD"
BEFORE_LETTER = "Answer:"  # what a question ends with: some tokenizers write a letter otherwise at the start of a text


def windows_of(prompts: PromptBuilder, texts: Sequence[Example], wanted: int | None) -> Iterator[Example]:
    """The windows of texts as examples. Raises SettingError for a window that cannot be."""
    size = window_size(prompts.bundle.limits.max_context, wanted)
    for example in texts:
        for window in text_windows(prompts, Text(example.id, example.group, example.question), size):
            shown = (Message("user", (prompts.detokenize(window.token_ids),)),)
            details = {"token_ids": list(window.token_ids), "bytes": window.size_bytes}
            yield Example(window.name, shown, (), window.file, details=details)


@dataclass(frozen=True)
class Letters:
    """The tokens by which a model says one of the letters: some that all begin with, such as a space, then its own."""

    shared: tuple[int, ...]
    own: tuple[int, ...]

    @classmethod
    def of(cls, prompts: PromptBuilder) -> Letters:
        """Raises BundleError where the tokenizer does not tell the letters apart by one token."""
        before = len(prompts.encode(BEFORE_LETTER))
        said = [prompts.encode(f"{BEFORE_LETTER} {letter}")[before:] for letter in LETTERS]
        same = next((n for n, tokens in enumerate(zip(*said, strict=False)) if len(set(tokens)) > 1), 0)
        own = tuple(tokens[same] for tokens in said if len(tokens) == same + 1)
        if len(set(own)) < len(LETTERS):
            raise BundleError(
                f"the tokenizer of {prompts.bundle.path} has no token of its own for each of {', '.join(LETTERS)}",
                "evaluate a bundle of another model",
            )
        return cls(tuple(said[0][:same]), own)


class Reader(Worker):
    """A worker whose jobs read. `examples` are what they are about: a task's own, or `most` windows of its texts.

    Raises SettingError for a window that cannot be, and what `Worker` raises.
    """

    def __init__(
        self,
        bundle: Path,
        settings: Settings,
        options: WorkerOptions,
        task: Task,
        examples: Sequence[Example],
        window: int | None,
        most: int | None,
    ) -> None:
        super().__init__(bundle, settings, replace(options, batch=1))
        windows = islice(windows_of(self.prompts, examples, window), most)
        self.task, self.examples = task, list(windows if task.asks == "tokens" else examples)

    def job(self, requests: Requests, done: Mapping[str, Record], under_way: UnderWay | None = None) -> Job:
        if self.prompts.bundle.engines:
            self._make_room(self._longest + 1)
        options = JobOptions(done=done, under_way=under_way, write_hint=self._options.write_hint)
        examples = {example.id: example for example in self.examples}
        return ReadingJob(self.model, requests, self.settings, options, self.task, examples)

    @property
    def _longest(self) -> int:
        """Tokens of the longest text."""
        return max(
            len(e.details["token_ids"]) + 1 if self.task.asks == "tokens" else len(self.prompts.encode(e.question)) + 3
            for e in self.examples
        )


class ReadingJob(Job):
    """Requests that are read one after the other."""

    def __init__(
        self,
        model: Model,
        requests: Requests,
        settings: Settings,
        options: JobOptions,
        task: Task,
        examples: Mapping[str, Example],
    ) -> None:
        super().__init__(model, requests, settings, options)
        self._settings, self._examples = settings, examples
        self._letters = Letters.of(model.prompts) if task.asks == "choice" else None
        self._cached: npt.NDArray[np.int64] = np.empty(0, np.int64)  # the tokens that the cache has rows of

    def records(self) -> Iterator[Record]:
        cache = self._model.runner.sessions.decoder.new_cache(slots=1, rows=1)
        for request in self._requests:
            if self._stopped.is_set():
                return
            self.order.append(request.id)
            record = record_of(request, self._settings)
            record.key = record_key(record.asked, [])
            if (before := self._options.done.get(request.id)) is not None:
                check_same_question(before, request, record.asked)
                self.kept += 1
                continue
            yield self._read(record, request, cache)

    def _read(self, record: Record, request: Request, cache: KVCache) -> Record:
        started = time.perf_counter()
        try:
            if self._letters is None:
                self._told(record, self._examples[request.id], cache)
            else:
                self._chosen(record, request, self._letters, cache)
        except InputError as error:
            if isinstance(error, BundleError):
                raise
            record.error, record.hint = str(error), self._options.write_hint(error)
            return record
        record.finish_reason, record.new_tokens, record.image_tokens = "stop", 0, 0
        record.times_ms = {"prefill_ms": 1000 * (time.perf_counter() - started)}
        return record

    def _told(self, record: Record, example: Example, cache: KVCache) -> None:
        """The answer says how unlikely the window's tokens were, all together."""
        prompt = self._model.prompts.plain(example.details["token_ids"])
        nats = text_nats(self._model, prompt, cache)
        record.prompt_tokens = len(prompt.token_ids)
        told = {"nats": float(nats.sum()), "tokens": len(nats), "bytes": example.details["bytes"]}
        record.answer = json.dumps(told)

    def _chosen(self, record: Record, request: Request, letters: Letters, cache: KVCache) -> None:
        """The answer is the likeliest letter after the question; what it shares with the one before is not read again.

        Raises ContextError where the question is too long.
        """
        prompt = self._model.prompts.plain([*self._model.prompts.encode(request.question), *letters.shared])
        ids, context = prompt.token_ids, self._model.context
        record.prompt_tokens = len(ids)
        if len(ids) >= context:
            raise ContextError(
                f"the question has {len(ids)} tokens, and the context holds {context}",
                f"pixtral export … --max-context {len(ids) + 1}",
            )
        known = min(len(self._cached), len(ids) - 1)
        differing = np.flatnonzero(self._cached[:known] != ids[:known])
        start = int(differing[0]) if len(differing) else known
        logits = last_logits(self._model, prompt, cache, start=start)
        self._cached = ids
        record.answer = LETTERS[int(logits[list(letters.own)].argmax())]
