"""A client that keeps time, against a server on this machine: pieces count once, what goes wrong has a name."""

from __future__ import annotations

from itertools import count

import pytest

from helpers.chat_stub import (
    BUSY,
    DONE,
    STREAM,
    USAGE,
    WORDS,
    Reply,
    chat_server,
    chunk,
    event,
    failure,
    model_list,
    usage_chunk,
)
from pixtral_runtime.bench.chat_client import API_KEY, ChatServer
from pixtral_runtime.errors import InputError, SettingError

PAGE = Reply(kind="text/html; charset=utf-8", body=b"<html>Welcome</html>")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (API_KEY, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_an_answer_has_a_time_for_every_piece_of_text_and_the_servers_counts() -> None:
    ticks = count()
    with chat_server() as chat:
        answer = ChatServer(chat.url, clock=lambda: float(next(ticks))).ask(b"{}")
    # The clock is read for the start, for each line and for the end: a line and an empty one for each event.
    assert answer.asked_s == 0 and answer.pieces_s == (3, 5, 7, 9)  # the first chunk has a role, and no text
    assert (answer.last_s, answer.finish, answer.error) == (11, "length", "")
    assert answer.ended_s == 16
    assert (answer.new_tokens, answer.prompt_tokens, answer.cached_tokens, answer.image_tokens) == (4, 30, 0, None)
    assert (answer.ttft_ms, answer.e2e_ms, answer.steps_ms) == (3000, 16000, [2000, 2000, 2000])
    assert answer.tpot_ms == pytest.approx(8000 / 3)


@pytest.mark.parametrize(
    "details", [{"image_tokens": 24}, {"multimodal_tokens": {"image": 24}, "created_cache_tokens": None}]
)
def test_image_tokens_are_read_where_servers_say_them(details: dict[str, object]) -> None:
    stream = (*STREAM[:-2], usage_chunk(USAGE | {"prompt_tokens_details": details}), DONE)
    with chat_server(Reply(stream)) as chat:
        answer = ChatServer(chat.url).ask(b"{}")
    assert (answer.image_tokens, answer.cached_tokens) == (24, None)


@pytest.mark.parametrize(
    ("stream", "tokens"),
    [
        ((*WORDS, chunk({}, "stop"), DONE), None),
        ((*WORDS, chunk({}, "stop")), None),  # its end is said, if not twice
        ((*WORDS, event('{"choices": [], "usage": [1]}'), DONE), None),
        ((*WORDS, usage_chunk({"completion_tokens": "4", "prompt_tokens_details": [3]}), DONE), None),
        ((b": keep-alive\n\n", b"event: message\n", *WORDS, usage_chunk({"completion_tokens": 9}), DONE), 9),
    ],
)
def test_without_the_servers_count_pieces_are_counted(stream: tuple[bytes, ...], tokens: int | None) -> None:
    with chat_server(Reply(stream)) as chat:
        answer = ChatServer(chat.url).ask(b"{}")
    assert (answer.error, answer.completion_tokens, answer.new_tokens) == ("", tokens, tokens or 4)


def test_thoughts_are_pieces_as_well() -> None:
    stream = (chunk({"reasoning_content": "Hm"}), chunk({"content": None, "reasoning": "m"}), *WORDS, DONE)
    with chat_server(Reply(stream)) as chat:
        assert len(ChatServer(chat.url).ask(b"{}").pieces_s) == 6


def test_a_connection_serves_many_requests_unless_the_server_closes_it() -> None:
    with chat_server(Reply()) as chat:
        server = ChatServer(chat.url)
        assert [server.ask(b"{}").error for _ in range(3)] == [""] * 3
        assert len(chat.connections) == 1
    with chat_server(Reply(headers=(("Connection", "close"),))) as chat:
        server = ChatServer(chat.url)
        assert [server.ask(b"{}").error for _ in range(3)] == [""] * 3
        assert len(chat.connections) == 3


@pytest.mark.parametrize(
    ("reply", "said", "status"),
    [
        (BUSY, "429 Too Many Requests: Too many requests are waiting.", 429),
        (failure(401, "Incorrect API key provided."), "401 Unauthorized: Incorrect API key provided.", 401),
        (Reply(status=400, kind="application/json", body=b'{"message": "too long"}'), "too long", 400),
        (Reply(status=422, kind="application/json", body=b'{"detail": [{"msg": "no"}]}'), '[{"msg": "no"}]', 422),
        (Reply(status=502, kind="text/html", body=b"<h1>nginx</h1>"), "502 Bad Gateway: a web page", 502),
        (Reply(status=500, kind="text/plain", body=b"oh\nno"), "500 Internal Server Error: oh no", 500),
        (Reply(status=302, body=b"", headers=(("Location", "http://else/"),)), "elsewhere, to http://else/", 302),
        (PAGE, "a web page, and no OpenAI API", 404),
        (Reply(kind="application/json", body=b'{"object": "chat.completion"}'), "streams nothing", None),
        (Reply(STREAM[:3], cut=True), "broke off after 2 pieces", None),
        (Reply(STREAM[:3]), "broke off after 2 pieces", None),
        (Reply((), cut=True), "broke off after no piece", None),
        (Reply(kind="text/event-stream", body=b""), "broke off after no piece", None),
        (Reply((*WORDS[:1], event('{"error": {"message": "CUDA error", "type": "x", "code": 500}}'), DONE)),
         "an error in the stream: CUDA error", None),
        (Reply((event("[1]"),)), "no chat completion", None),
        (Reply((event('{"choices": [7]}'),)), "no chat completion", None),
        (Reply((b"data: {\n\n",)), "no chat completion", None),
        (Reply((chunk({}, "stop"), DONE)), "no text", None),
        (Reply(waits=True), "nothing came for 0.05 s, after no piece", None),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_in_the_answer_with_the_servers_words(reply: Reply, said: str, status: int | None) -> None:
    with chat_server(reply, Reply()) as chat:
        server = ChatServer(chat.url, silence_s=0.05)
        answer = server.ask(b"{}")
        assert said in answer.error and answer.status == status, answer
        assert answer.ended_s >= answer.asked_s
        assert server.ask(b"{}").error == ""  # the next one is not harmed


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (429, "2", 2),
        (429, "3600", 10),
        (429, "-1", 0),
        (429, "nan", 0),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", 0.5),
        (503, "2", 0),
    ],
)
def test_a_refusal_says_how_long_to_wait(status: int, header: str, seconds: float) -> None:
    with chat_server(failure(status, "later", (("Retry-After", header),))) as chat:
        assert ChatServer(chat.url).ask(b"{}").again_s == seconds
    with chat_server(failure(429, "later")) as chat:
        assert ChatServer(chat.url).ask(b"{}").again_s == 0.5


def test_a_server_that_is_gone_and_one_that_never_was() -> None:
    with chat_server() as chat:
        pass
    assert "nobody listens there" in ChatServer(chat.url).ask(b"{}").error
    assert "no such host" in ChatServer("http://a..b/v1").ask(b"{}").error
    with chat_server() as chat:
        assert "https fails" in ChatServer(chat.url.replace("http", "https")).ask(b"{}").error


def test_a_request_that_waited_has_waited_since_it_came() -> None:
    ticks = count(100)
    with chat_server(Reply(), BUSY) as chat:
        server = ChatServer(chat.url, clock=lambda: float(next(ticks)))
        assert server.ask(b"{}", 42.0).asked_s == server.ask(b"{}", 42.0).asked_s == 42


def test_the_only_model_is_the_one() -> None:
    with chat_server() as chat:
        assert ChatServer(chat.url).only_model() == "a-model"


@pytest.mark.parametrize(
    ("models", "said", "hint"),
    [
        (model_list("a", "b"), "several models, or none: a, b", "model=NAME"),
        (model_list(), "several models, or none: none", "model=NAME"),
        (PAGE, "no list of an OpenAI API", "model=NAME"),
        (Reply(kind="application/json", body=b'{"data": 3}'), "no list of an OpenAI API", "model=NAME"),
        (failure(401, "Incorrect API key provided: k-123."), "401 Unauthorized: Incorrect", f"export {API_KEY}=…"),
        (failure(500, "no"), "500 Internal Server Error: no", "log"),
    ],
)
def test_a_server_without_one_model_is_refused(models: Reply, said: str, hint: str) -> None:
    with chat_server(models=models) as chat, pytest.raises(InputError) as caught:
        ChatServer(chat.url).only_model()
    assert said in str(caught.value) and hint in caught.value.hint


def test_an_address_without_its_path_gets_a_hint_with_it() -> None:
    with chat_server() as chat, pytest.raises(InputError, match="404 Not Found") as caught:
        ChatServer(chat.url.removesuffix("/v1")).only_model()
    assert caught.value.hint == f"url={chat.url}"


def test_the_key_is_sent_and_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "k-123")
    with chat_server(failure(401, "Incorrect API key provided: k-123.")) as chat:
        assert ChatServer(chat.url).ask(b"{}").error.endswith("provided: ….")
    assert chat.keys == ["Bearer k-123"]
    with pytest.raises(InputError, match=f"{API_KEY} would go to a.example"):
        ChatServer("http://a.example/v1")
    monkeypatch.delenv(API_KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    with chat_server() as chat:
        ChatServer(chat.url).ask(b"{}")
    assert chat.keys == [None]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a/v1", "http://a:b/v1", "http://a/v 1", "http://a/ä"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingError, match="no address of a server"):
        ChatServer(url)


def test_a_password_in_an_address_is_refused_and_not_quoted() -> None:
    with pytest.raises(InputError, match="holds a name or a password") as caught:
        ChatServer("http://me:secret@127.0.0.1:8000/v1")
    assert "secret" not in str(caught.value) + caught.value.hint
