"""The HTTP client that asks a judge: what goes to whom, and how much is taken from somebody unknown.

A key goes over https, or to this machine. `OPENAI_API_KEY` is meant for OpenAI, and goes nowhere else. No redirect is
followed, since the picture would go along. An answer has an end, in bytes and in time.
"""

from __future__ import annotations

import ipaddress
import os
import re
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pixtral_runtime.errors import InputError, Option, SettingError, extra_missing

DEFAULT_SERVER = "https://api.openai.com/v1"
OPENAI_KEY, JUDGE_KEY = "OPENAI_API_KEY", "PIXTRAL_JUDGE_KEY"
LARGEST_ANSWER_BYTES = 1 << 22  # a rating is some kilobytes

T = TypeVar("T")


def open_client(url: str, timeout_s: float, retries: int) -> Any:
    """An OpenAI client for this server alone.

    Raises SettingError for what is no address, InputError for a key that cannot be sent there, and MissingPackageError.
    """
    try:
        import openai
    except ImportError as error:
        raise extra_missing("openai", "eval", "Asking a judge") from error
    host, is_safe = _place(url)
    name, key = key_for(url)
    if not re.fullmatch("[!-~]*", key):  # it would stand in the error about a header that cannot be
        raise InputError(f"{name} holds characters that no key has", f"export {name}=…")
    if key and not is_safe:
        raise InputError(
            f"{name} would go to {host} for everybody on the way to read",
            Option("judge_url", f"https://{host}/v1"),
            f"unset {name}",
        )
    http = openai.DefaultHttpxClient(
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # what is packed may be a thousand times as long
        event_hooks={"response": [_bound]},
    )
    client = openai.OpenAI(
        base_url=url, api_key=key or "none", timeout=timeout_s, max_retries=retries, http_client=http
    )
    if host != urlsplit(DEFAULT_SERVER).hostname:
        client.organization = client.project = None  # from the environment, and OpenAI's business
    return client


def key_for(url: str) -> tuple[str, str]:
    """The variable whose key is for this server, and what it holds; empty where none is set, as for one's own."""
    judge_key = os.environ.get(JUDGE_KEY, "").strip()
    if not judge_key and _place(url)[0] == urlsplit(DEFAULT_SERVER).hostname:
        return OPENAI_KEY, os.environ.get(OPENAI_KEY, "").strip()
    return JUDGE_KEY, judge_key


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, or TimeoutError after so long; the thread that does it is then left alone."""
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="judge's answer", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _place(url: str) -> tuple[str, bool]:
    """The host of an address, and whether nobody can read what goes there. Raises SettingError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise SettingError(f"{url} is no address of a judge", Option("judge_url", DEFAULT_SERVER))
    return host, parts.scheme == "https" or _is_this_machine(host)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(response: Any) -> None:
    """Called with a response whose body has not been read: it ends with an error where it would not end."""
    import httpx2

    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(f"the answer is packed by {response.headers['Content-Encoding']}, which nobody asked for")
    stream = response.stream

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Any:
            size = 0
            for block in stream:
                size += len(block)
                if size > LARGEST_ANSWER_BYTES:
                    raise ValueError(f"the answer has more than {LARGEST_ANSWER_BYTES:,} bytes")
                yield block

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()
