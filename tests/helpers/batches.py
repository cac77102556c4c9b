"""Batches as OpenAI's guide to its Batch API writes them, and what became of them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from helpers.places import ROOT

PICTURES = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))


def picture_url(number: int) -> str:
    data = PICTURES[number % len(PICTURES)].read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def batch_line(id: str, url: str | None = None, *, detail: str = "auto", **body: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": f"What is shown in {id}?"}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url, "detail": detail}})
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, **body}
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def state_of(client: OpenAI, id: str) -> Any:
    return client.batches.retrieve(id)


def ended(client: OpenAI, id: str) -> Any:
    """A batch that is over, asked for again and again as clients do."""
    while (batch := state_of(client, id)).status in ("validating", "in_progress", "finalizing", "cancelling"):
        time.sleep(0.01)
    return batch


def answers_of(lines: str) -> list[Any]:
    """What an output file says, line by line, without what depends on the moment and the company."""
    found = [json.loads(line) for line in lines.splitlines()]
    for one in found:
        for name in ("id", "request_id"):
            (one if name == "id" else one["response"]).pop(name)
        body = one["response"]["body"]
        for name in ("id", "created"):
            body.pop(name, None)
        if "usage" in body:
            del body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


@contextmanager
def server_process(bundle: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    """`pixtral serve` as a process of its own, with a folder for batches, and a client of it. Killed at the end."""
    command = [sys.executable, "-m", "pixtral_cli", "serve", str(bundle), "--port", "0", "--batch-api-dir", str(folder)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:[0-9]+/v1", line):
                break
        else:
            raise AssertionError("".join(said))
        reader = threading.Thread(target=deque, args=(process.stderr, 0), daemon=True)  # or its log fills the pipe
        reader.start()
        yield process, OpenAI(base_url=found[0], api_key="none", timeout=60)
        process.kill()
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
