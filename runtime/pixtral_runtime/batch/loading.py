"""One request of a job on its way: from files to a prompt, to a generation, and from its tokens to a record."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pixtral_runtime.batch.openai_output import token_logprobs
from pixtral_runtime.batch.record_store import RecordStore
from pixtral_runtime.batch.records import Record, Request, Settings, record_key, record_of
from pixtral_runtime.batch.results_file import check_same_question
from pixtral_runtime.batch.under_way import MOST_DEATHS, UnderWay
from pixtral_runtime.errors import HintWriter, ImageMemoryError, InputError, PixtralError, RequestError, python_hint
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.json_schema import JsonSchema, SchemaCache
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.decode_memory import DecodeMemory
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import picture_file
from pixtral_runtime.inputs.openai_chat import FieldError, check_tokens
from pixtral_runtime.inputs.preprocess import LOW_DETAIL_TOKENS, see_within
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder
from pixtral_runtime.sources.documents import DOCUMENT_SUFFIXES

READER_THREADS = 2  # threads; decoding and scaling one image takes a few per cent of encoding it


@dataclass
class Loaded:
    """A request whose images were read. Without a prompt its record is finished: an error, or `known` from before.

    One that `can_share` has the answer of any other with its key.
    """

    request: Request
    record: Record
    prompt: Prompt | None = None
    schema: JsonSchema | None = None
    known: bool = False
    can_share: bool = False


@dataclass
class RequestLoader:
    """What all requests of a job share. `done` are records of before by id, `schema` is that of the whole job.

    `check_same` refuses a record of before that is the answer to something else. May be used by many threads.
    """

    prompts: PromptBuilder
    settings: Settings
    schema: JsonSchema | None = None
    done: Mapping[str, Record] = field(default_factory=dict)
    under_way: UnderWay | None = None
    write_hint: HintWriter = python_hint
    memory: DecodeMemory = field(default_factory=lambda: DecodeMemory(READER_THREADS))
    check_same: Callable[[Record, Request, str], None] = check_same_question

    def __post_init__(self) -> None:
        self._schemas = SchemaCache(self.prompts)

    def load(self, request: Request) -> Loaded:
        """From files to a prompt. Raises InputError where the record of before is the answer to something else."""
        record = record_of(request, self.settings)
        before, under_way = self.done.get(request.id), self.under_way
        if before is not None:
            self.check_same(before, request, record.asked)
        if under_way is not None:
            under_way.begin(request.id)
        try:
            started = time.perf_counter()
            files = []
            for picture, image in zip(request.images, record.images, strict=True):
                files.append(picture_file(picture))
                image.sha256 = hashlib.sha256(files[-1]).hexdigest()
            record.key = record_key(record.asked, [str(image.sha256) for image in record.images])
            if before is not None and before.key == record.key:
                return Loaded(request, record, known=True)
            is_drawn = self.settings.sampling(request).temperature > 0
            if not is_drawn and (same := self.answer_to(record.key)) is not None:
                return Loaded(request, record.with_answer_of(same))
            if under_way is not None and request.id in under_way.accused:
                raise RequestError(
                    f"pixtral died {MOST_DEATHS} times while it worked on this, the last time on nothing else",
                    "a smaller picture or a shorter prompt",
                    "delete its line from the results, and resume on a machine with more memory",
                )
            with self.memory.room_for(files):
                prompt = self._prompt(request, record, files, started)
            return Loaded(request, record, prompt, self._schema_of(request), can_share=not is_drawn)
        except InputError as error:
            if before is not None and before.error is None and record.key is None and not _has_broken(request):
                return Loaded(request, record, known=True)  # an answer outlives its picture
            self.fail(record, error)
            if isinstance(error, ImageMemoryError):
                record.key = None  # so that the next run tries again
                return Loaded(request, record)
            now = (record.key, record.asked, record.error)
            is_same = before is not None and (before.key, before.asked, before.error) == now
            return Loaded(request, record, known=is_same)

    def _prompt(self, request: Request, record: Record, files: Sequence[bytes], started: float) -> Prompt:
        pictures = []
        for source, image, data in zip(request.images, record.images, files, strict=True):
            picture = decode_image(data, image.path, apply_exif=self.settings.exif).pixels
            image.width, image.height = picture.size
            is_small = isinstance(source, StoredPicture) and source.is_small
            pictures.append(see_within(picture, LOW_DETAIL_TOKENS) if is_small else picture)
        record.times_ms["image"] = _ms_since(started)
        started = time.perf_counter()
        left = iter(pictures)
        messages = [
            replace(m, content=tuple(part if isinstance(part, str) else next(left) for part in m.content))
            for m in request.messages
        ]
        prompt = self.prompts.build(messages)
        _ = prompt.row_keys  # hashed here, where there is time
        record.image_tokens, record.prompt_tokens = prompt.image_tokens, len(prompt.token_ids)
        record.times_ms["preprocess"] = _ms_since(started)
        return prompt

    def answer_to(self, key: str | None) -> Record | None:
        """A record that answers the same already, under whatever name."""
        return self.done.answer_to(key) if isinstance(self.done, RecordStore) else None

    def _schema_of(self, request: Request) -> JsonSchema | None:
        """Its own, or the job's. Raises FieldError."""
        text = None if request.own is None else request.own.json_schema
        return self.schema if text is None else self._schemas.compiled(text)

    def generation(self, loaded: Loaded) -> Generation | None:
        """What the scheduler works on; None where there is no prompt, or no answer can be, as the record then says."""
        request, own = loaded.request, loaded.request.own
        if loaded.prompt is None:
            return None
        constraint = None if loaded.schema is None else loaded.schema.constraint()
        sampling = self.settings.sampling(request)
        if own is None:
            return Generation(loaded.prompt, request.max_new_tokens, sampling, constraint)
        try:
            check_tokens((token for token, _ in own.logit_bias), self.prompts.bundle.model.decoder.vocab_size)
        except FieldError as error:
            self.fail(loaded.record, error)
            return None
        text = AnswerText(self.prompts, own.stops)
        bias = dict(own.logit_bias)
        return Generation(loaded.prompt, request.max_new_tokens, sampling, constraint, text, bias, own.top_logprobs)

    def finish(self, record: Record, generation: Generation) -> Record:
        """The record of a generation that is done."""
        if generation.error is not None:
            self.fail(record, generation.error)
            return record
        if generation.text is None:
            record.answer, record.thinking = self.prompts.read_answer(generation.token_ids)
        else:
            generation.text.finish()
            pieces = generation.text.pieces
            record.answer = "".join(piece.text for piece in pieces if not piece.is_thinking)
            record.thinking = "".join(piece.text for piece in pieces if piece.is_thinking) or None
            record.reasoning_tokens = self.prompts.thought_tokens(generation.token_ids)
        if generation.top_logprobs is not None:
            record.logprobs = token_logprobs(self.prompts, generation.logprobs)
        record.finish_reason, record.new_tokens = generation.finish_reason, len(generation.token_ids)
        record.reused_tokens = generation.reused_tokens
        times = generation.times
        stages = {"vision": times.vision_ms, "prefill": times.prefill_ms, "decode": times.decode_ms}
        record.times_ms |= {name: round(value, 3) for name, value in stages.items()}
        return record

    def fail(self, record: Record, error: PixtralError) -> None:
        record.error, record.hint = str(error), self.write_hint(error)
        if record.own is not None:
            record.status = 400 if isinstance(error, InputError) else 500
            record.param = error.field if isinstance(error, FieldError) else None


def _has_broken(request: Request) -> bool:
    """Whether a document of a request can be opened: where its pages cannot be read, it is not that of before."""
    files = (image.file for image in request.images if isinstance(image, StoredPicture))
    return any(
        file is not None and file.suffix.lower() in DOCUMENT_SUFFIXES and os.access(file, os.R_OK) for file in files
    )


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
