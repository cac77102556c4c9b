"""Records of answers about pictures that are there, without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from helpers.results import SETTINGS
from pixtral_runtime.batch.asked_pictures import AnsweredRequests
from pixtral_runtime.batch.records import Record, Request, record_of
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import picture_file


def answer(request: Request, text: str | None = None) -> Record:
    """What a job would write: a whole answer, that says which request it is to unless `text` says something."""
    record = record_of(request, SETTINGS)
    for picture, info in zip(request.images, record.images, strict=True):
        data = picture_file(picture)
        info.sha256 = hashlib.sha256(data).hexdigest()
        info.width, info.height = decode_image(data, info.path).pixels.size
    record.answer, record.finish_reason = f"About {request.id}." if text is None else text, "stop"
    record.prompt_tokens, record.image_tokens, record.new_tokens, record.reused_tokens = 20, 16, 4, 7
    record.times_ms = {"vision": 1.5}
    return record


def answered(requests: Sequence[Request], texts: Mapping[str, str] | None = None) -> AnsweredRequests:
    """All of them, with answers of these texts by their ids."""
    records = {request.id: answer(request, (texts or {}).get(request.id)) for request in requests}
    return AnsweredRequests(requests, records)
