"""The HTTP client that asks a judge: what goes to whom, and how much is taken from somebody unknown.

Which key goes where is `server_address`'s. No redirect is followed, since the picture would go along. An answer has an
end, in bytes and in time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pixtral_runtime.errors import Option, extra_missing
from pixtral_runtime.server_address import OPENAI_SERVER, address_of, key_for, quoted, sendable_key

JUDGE_KEY = "PIXTRAL_JUDGE_KEY"
JUDGE_URL = Option("judge_url", OPENAI_SERVER)
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
    address = address_of(url, JUDGE_URL)
    key = sendable_key(address, JUDGE_KEY, JUDGE_URL)
    http = openai.DefaultHttpxClient(
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # what is packed may be a thousand times as long
        event_hooks={"response": [_bound]},
    )
    client = openai.OpenAI(
        base_url=url, api_key=key or "none", timeout=timeout_s, max_retries=retries, http_client=http
    )
    if address.host != urlsplit(OPENAI_SERVER).hostname:
        client.organization = client.project = None  # from the environment, and OpenAI's business
    return client


def said_by(url: str, said: object) -> str:
    """What a judge said, in one line, without the key."""
    return quoted(said, key_for(address_of(url, JUDGE_URL).host, JUDGE_KEY)[1])


def key_name(url: str) -> str:
    """The variable whose key is for this server."""
    return key_for(address_of(url, JUDGE_URL).host, JUDGE_KEY)[0]


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
