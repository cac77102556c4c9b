"""What a job is made of, as data: requests in, records out.

A request is a conversation whose images are paths. It becomes one record: an answer, or an error with its hint.
`Settings` are what decides an answer beside the request itself; a job that is taken up again must have the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixtral_runtime.generation.sampling import Sampling
from pixtral_runtime.inputs.conversation import Message, StoredPicture
from pixtral_runtime.json_data import from_json

SHARED = (  # by records with the same key
    *("answer", "thinking", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens", "reasoning_tokens"),
    *("logprobs", "error", "hint", "status", "param"),
)
RARE = ("thinking", "own", "logprobs", "reasoning_tokens", "status", "param", "sidecar", "tags")


@dataclass(frozen=True)
class Settings:
    """Of a whole job. `bundle` is the bundle's fingerprint, `json_schema` the sha256 of the schema's text.

    At temperature 0 nothing is drawn: whatever `top_p` and `seed` are given, they are then the defaults. Raises
    SettingError for values that cannot be.
    """

    bundle: str
    preprocess: str = "mistral"
    max_image_side: int | None = None
    image_tokens: int | None = None
    exif: bool = True
    temperature: float = 0.0
    top_p: float = 0.8
    seed: int = 0
    json_schema: str | None = None

    def __post_init__(self) -> None:
        _ = Sampling(self.temperature, self.top_p, self.seed)  # refused here, before the model is loaded
        if self.temperature == 0:
            object.__setattr__(self, "top_p", Settings.top_p)
            object.__setattr__(self, "seed", Settings.seed)

    def sampling(self, request: Request) -> Sampling:
        """How the request's answer is drawn.

        What the request says itself is taken. Otherwise its seed follows from the job's and the request's id: answers
        over a folder are independent draws, and the same ones again in another order, on another shard, or after an
        interruption.
        """
        own = request.own or OwnSettings()
        temperature = self.temperature if own.temperature is None else own.temperature
        top_p = self.top_p if own.top_p is None else own.top_p
        if own.seed is not None:
            return Sampling(temperature, top_p, own.seed % 2**64)
        digest = hashlib.sha256(f"{self.seed} {request.id}".encode("utf-8", "surrogateescape")).digest()
        return Sampling(temperature, top_p, int.from_bytes(digest[:8]))


@dataclass(frozen=True)
class OwnSettings:
    """What a request of OpenAI's API says of its answer itself, and the job's settings do not. None is what it leaves.

    `json_schema` is the text of a schema. `model` is a name, and decides nothing.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is said, as a record shows it: the schema by its sha256."""
        said = {name: value for name, value in asdict(self).items() if value is not None and value != ()}
        if self.json_schema is not None:
            said["json_schema"] = hashlib.sha256(self.json_schema.encode()).hexdigest()
        return said


@dataclass(frozen=True)
class Request:
    """`id` names it within its job. Images in the messages are not read yet."""

    id: str
    messages: tuple[Message, ...]
    max_new_tokens: int = 128
    own: OwnSettings | None = None  # of one in OpenAI's format
    tags: str | None = None  # that were filled into the prompt

    @property
    def images(self) -> tuple[Path | StoredPicture, ...]:
        parts = (part for message in self.messages for part in message.content)
        return tuple(part for part in parts if isinstance(part, Path | StoredPicture))

    @property
    def question(self) -> str:
        """The last message's text, for people to read."""
        return "\n".join(part for part in self.messages[-1].content if isinstance(part, str))

    def asked(self, settings: Settings) -> str:
        """A hash of all that was asked and how, 16 hex digits; images by their place, not their content."""
        turns = [[m.role, *map(_hashable, m.content), *_of_tools(m)] for m in self.messages]
        own = [] if self.own is None else [self.own.to_dict()]
        return _digest([turns, self.max_new_tokens, asdict(settings), *own])


@dataclass
class ImageInfo:
    """An image of a request. Size in pixels, upright; `sha256` of the file. None where it could not be read.

    `path` is the beginning of a data: URL where the image is one, `time_s` where a frame stands in its video.
    """

    path: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    time_s: float | None = None


@dataclass(frozen=True)
class SidecarNote:
    """What the file beside a picture gets, noted before it is written: whoever goes on knows what is done already.

    `before` is what stood there before any caption of this job, `found` what stood there when this was noted; that is
    an earlier caption where the picture has changed since. None is no file.
    """

    path: str
    text: str
    before: str | None = None
    found: str | None = None


@dataclass
class Record:
    """What became of one request. Times in milliseconds.

    `key` is the same for the same question about the same image contents under the same settings, whatever the files
    are called. `finish_reason` is "stop" where the model ended the answer, "length" where the limit did.
    """

    id: str
    question: str
    asked: str
    images: list[ImageInfo] = field(default_factory=list)
    key: str | None = None
    answer: str | None = None
    thinking: str | None = None  # of a reasoning model, in a block before the answer
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    reused_tokens: int | None = None  # of the prompt, copied from a slot that had them instead of prefilled
    new_tokens: int | None = None
    times_ms: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    hint: str | None = None
    own: dict[str, Any] | None = None  # what a request in OpenAI's format said of its answer
    logprobs: list[Any] | None = None  # of the tokens, where it asked for them, as OpenAI's API writes them
    reasoning_tokens: int | None = None  # of the new ones, before the answer
    status: int | None = None  # of the error, as HTTP has it, and the field of such a request that is to blame
    param: str | None = None
    sidecar: SidecarNote | None = None
    tags: str | None = None  # that the question has from the picture's sidecar, which may be another one since

    @property
    def is_whole(self) -> bool:
        """Whether there is an answer that the model ended itself, and that says something."""
        return self.error is None and self.finish_reason == "stop" and bool((self.answer or "").strip())

    @property
    def is_shared(self) -> bool:
        """Whether the answer was made for another record with the same key."""
        return self.answer is not None and not self.times_ms

    def with_answer_of(self, other: Record) -> Record:
        """This record, with the answer that another one gives to the same question about the same pictures."""
        for name in SHARED:
            setattr(self, name, getattr(other, name))
        for image, same in zip(self.images, other.images, strict=True):
            image.width, image.height = same.width, same.height
        self.times_ms.clear()
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without what only some requests have."""
        data = {name: value for name, value in asdict(self).items() if name not in RARE or value is not None}
        for image in data["images"]:
            if image["time_s"] is None:
                del image["time_s"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Raises TypeError where the dictionary is no record."""
        return from_json(cls, data)


def record_of(request: Request, settings: Settings) -> Record:
    """The request's record before anything was done."""
    images = [
        ImageInfo(str(image), time_s=None if isinstance(image, Path) else image.time_s) for image in request.images
    ]
    own = None if request.own is None else request.own.to_dict()
    asked, said = request.asked(settings), asdict(settings)
    return Record(request.id, request.question, asked, images, settings=said, own=own, tags=request.tags)


def record_key(asked: str, image_hashes: Sequence[str]) -> str:
    """16 hex digits for a question about images of these contents."""
    return _digest([asked, *image_hashes])


def _hashable(part: object) -> object:
    if isinstance(part, str):
        return part
    return ["small"] if isinstance(part, StoredPicture) and part.is_small else None


def _of_tools(message: Message) -> list[dict[str, object]]:
    """What a message has beside its content, as JSON that no content can be."""
    if not message.tool_calls and message.tool_call_id is None:
        return []
    return [{"calls": [asdict(call) for call in message.tool_calls], "result_of": message.tool_call_id}]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
