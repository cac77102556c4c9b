"""Records as the output of OpenAI's Batch API: one JSON object a line, a `chat.completion` or what went wrong.

A request that was refused has the status and the error that the chat API gives; one that was never asked has no
response.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import Option, unwritable
from pixtral_runtime.files import replacing
from pixtral_runtime.generation.logits import TokenLogprob
from pixtral_runtime.inputs.prompt import PromptBuilder

SUFFIX = ".openai.jsonl"


def write_openai_output(records: Iterable[Record], path: Path) -> None:
    """Replace a file by the records' lines, in their order. Raises InputError, MachineError."""
    created_s = int(time.time())
    try:
        with replacing(path) as file:
            for record in records:
                file.write(line_of(output_of(record, created_s=created_s)))
    except OSError as error:
        raise unwritable(path, error, Option("output", "another/place.jsonl")) from error


def line_of(output: dict[str, Any]) -> bytes:
    return json.dumps(output, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def output_of(record: Record, *, created_s: int, batch: str = "", model: str | None = None) -> dict[str, Any]:
    """One line of a batch's output. The same record of the same batch has the same ids whenever it is written.

    `model` is the name under which it was asked; None for what the request said.
    """
    own = _hex(batch, record.id, record.asked)
    status = 200
    if record.error is None:
        name = model or str((record.own or {}).get("model") or record.settings.get("bundle", ""))
        body = _completion(record, f"chatcmpl-{own}", created_s, name)
    else:
        status = record.status or 400
        kind = "invalid_request_error" if status < 500 else "server_error"
        message = f"{record.error} ({record.hint})" if record.hint else record.error
        body = {"error": {"message": message, "type": kind, "param": record.param, "code": None}}
    response = {"status_code": status, "request_id": f"req_{own}", "body": body}
    return {"id": f"batch_req_{own}", "custom_id": record.id, "response": response, "error": None}


def not_asked(id: str, batch: str, code: str, message: str) -> dict[str, Any]:
    """The line of a request that got no answer because its batch ended before."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{_hex(batch, id)}", "custom_id": id, "response": None, "error": error}


def token_logprobs(prompts: PromptBuilder, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities as the chat API writes them, without the token that ends an answer."""
    eos = prompts.bundle.model.eos
    return [
        token_of(prompts, one.token_id, one.logprob)
        | {"top_logprobs": [token_of(prompts, *other) for other in one.top]}
        for one in tokens
        if one.token_id != eos
    ]


def token_of(prompts: PromptBuilder, token_id: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability. Bytes that are no characters by themselves are in `bytes` alone."""
    data = prompts.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def _completion(record: Record, id: str, created_s: int, model: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": record.answer, "refusal": None}
    if record.thinking:
        message["reasoning_content"] = record.thinking
    logprobs = None if record.logprobs is None else {"content": record.logprobs, "refusal": None}
    read, made, of_images = record.prompt_tokens or 0, record.new_tokens or 0, record.image_tokens or 0
    details = {"cached_tokens": record.reused_tokens or 0, "image_tokens": of_images, "text_tokens": read - of_images}
    return {
        "id": id, "object": "chat.completion", "created": created_s, "model": model,
        "system_fingerprint": record.settings.get("bundle"),
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": record.finish_reason}],
        "usage": {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": details,
            "completion_tokens_details": {"reasoning_tokens": record.reasoning_tokens or 0},
        },
    }  # fmt: skip


def _hex(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
