"""Requests of a small job, and records as answers to them."""

from __future__ import annotations

from pathlib import Path

from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.records import Record, Request, Settings, record_of

SETTINGS = Settings("fingerprint")
REQUESTS = requests_of_images([Path(f"{name}.png") for name in "abc"], ["What?"], None, 8)
TEXTS = ("ja, „schön“", 'say "hi"\r\nthen\x00 \u2028 go', "=1+1", "", "🙂 \\ud800")


def answered(request: Request, answer: str = "A cat.", settings: Settings = SETTINGS) -> Record:
    record = record_of(request, settings)
    record.key, record.answer, record.finish_reason, record.new_tokens = "00", answer, "stop", 3
    record.times_ms = {"vision": 1.5, "decode": 20.25}
    return record


def failed(request: Request) -> Record:
    record = record_of(request, SETTINGS)
    record.error, record.hint = f"{request.id} cannot be read", "look at it"
    return record
