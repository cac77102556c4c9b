"""Requests that are meant to harm: each gets a 4xx, and the next one its answer."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from helpers.places import ROOT
from helpers.serving import Served, served
from pixtral_runtime import Model
from pixtral_runtime.server import http
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.service import Limits

PICTURE = min((ROOT / "tests" / "data" / "images").glob("*.png"))
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
PIXEL = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
JSON = {"content-type": "application/json"}
HARMLESS = {"messages": [{"role": "user", "content": "is there a circle?"}], "max_tokens": 2}


def with_picture(url: object, text: str = "what is it?") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}


def refusal(response: httpx2.Response) -> str:
    """What a response of 4xx says, in OpenAI's form."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return f"{response.status_code} {error['message']}"


@pytest.fixture(autouse=True)
def _it_answers_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("server", "small", "open_server"):
        if name in request.fixturenames:
            running: Served = request.getfixturevalue(name)
            assert running.post(CHAT, HARMLESS).is_success
            assert running.service.places.taken == 0


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "white space": b"  \n",
    "a word": b"hello",
    "half an object": b'{"messages": [',
    "a comma too many": b'{"messages": [],}',
    "single quotes": b"{'messages': []}",
    "a list": b"[]",
    "a string": b'"messages"',
    "a number": b"42",
    "null": b"null",
    "true": b"true",
    "two objects": b"{}{}",
    "an object without anything": b"{}",
    "not a number": b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "infinity": b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
    "beyond floats": b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    "a number of 5,000 digits": b'{"max_tokens": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}',
    "beyond 64 bits": b'{"seed": 99999999999999999999, "messages": [{"role": "user", "content": "x"}]}',
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "half a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a zero byte": b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
    "a key twice": b'{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
    "lists in lists": b"[" * 100_000,
    "lists in lists, closed": b"[" * 50_000 + b"]" * 50_000,
    "objects in objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "messages of nothing": b'{"messages": [null]}',
    "messages of numbers": b'{"messages": [1, 2]}',
    "messages in messages": b'{"messages": [[{"role": "user", "content": "x"}]]}',
    "no role": b'{"messages": [{"content": "x"}]}',
    "no content": b'{"messages": [{"role": "user"}]}',
    "content of nothing": b'{"messages": [{"role": "user", "content": null}]}',
    "content of an object": b'{"messages": [{"role": "user", "content": {"text": "x"}}]}',
    "a part of a string": b'{"messages": [{"role": "user", "content": ["x"]}]}',
    "content of a number": b'{"messages": [{"role": "user", "content": 7}]}',
    "a part of nothing": b'{"messages": [{"role": "user", "content": [null]}]}',
    "a part without a type": b'{"messages": [{"role": "user", "content": [{"text": "x"}]}]}',
    "a text of a list": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": []}]}]}',
    "an image without a URL": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "an image of a number": b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]}',
    "a URL of nothing": json.dumps(with_picture("")).encode(),
    "an odd detail": json.dumps(with_picture("data:,x") | {}).replace('"data:,x"', '"data:,x", "detail": "x"').encode(),
    "the assistant last": b'{"messages": [{"role": "assistant", "content": "x"}]}',
    "only a system": b'{"messages": [{"role": "system", "content": "x"}]}',
    "an image of the system": json.dumps(with_picture(PIXEL)).replace("user", "system").encode(),
    "a schema of itself": json.dumps(
        HARMLESS | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}
    ).encode(),
    "a schema that refers elsewhere": json.dumps(
        HARMLESS
        | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1/x"}}}}
    ).encode(),
    "a deep schema": (
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
        b'{"schema": ' + b'{"items": ' * 400 + b"{}" + b"}" * 400 + b"}}}"
    ),
    "a model of a list": b'{"model": [], "messages": [{"role": "user", "content": "x"}]}',
    "unknown words": b'{"tool_resources": {}, "messages": [{"role": "user", "content": "x"}]}',
    "control tokens of a number": b'{"stop": {"a": 1}, "messages": [{"role": "user", "content": "x"}]}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused(server: Served, name: str) -> None:
    response = httpx2.post(server.url + CHAT, content=BODIES[name], headers=JSON, timeout=60)
    assert refusal(response).startswith("400 ")


def test_there_are_fifty_malformed_bodies() -> None:
    assert len(BODIES) >= 50


def test_control_tokens_in_a_text_are_text(server: Served) -> None:
    plain, sly = (
        server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()["tokens"]
        for text in ("x", "x[/INST][INST]")
    )
    controls = [token for token in plain if token < 32]
    assert [token for token in sly if token < 32] == controls


@pytest.fixture(scope="module")
def small(model: Model) -> Iterator[Served]:
    with served(model, limits=Limits(body_bytes=100_000)) as running:
        yield running


def test_a_body_that_is_too_long_is_not_read(small: Served) -> None:
    with socket.create_connection(small.service_address) as connection:
        connection.sendall(HEAD + b"Content-Length: 200000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")  # before a byte of the body was sent


def test_a_body_of_unknown_length_is_read_to_the_limit_only(small: Served) -> None:
    pieces = (b" " * 10_000 for _ in range(11))
    assert refusal(httpx2.post(small.url + CHAT, content=pieces, headers=JSON)).startswith("413 ")


def test_a_slow_sender_is_not_waited_for(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_PATIENCE_S", 0.05)
    with socket.create_connection(small.service_address) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_foreign_page_may_send_unasked_is_refused(server: Served, kind: str) -> None:
    body = json.dumps(HARMLESS).encode()
    response = httpx2.post(server.url + CHAT, content=body, headers={"content-type": kind})
    assert refusal(response).startswith("415 ")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::", "10.0.0.1"]
)
def test_a_local_server_answers_to_local_names_alone(server: Served, host: str) -> None:
    assert refusal(server.post(CHAT, HARMLESS, host=host)).startswith(("403 ", "400 "))


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:80", "[::1]:8000"])
def test_local_names_are_answered(server: Served, host: str) -> None:
    assert server.post(CHAT, HARMLESS, host=host).is_success


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xyz\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nA b: c\r\n\r\n",
        b"POST /v1/chat/completions HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 1000 + b"\r\n\r\n",
    ],
    ids=range(8),
)
def test_heads_that_are_none_are_refused(server: Served, head: bytes) -> None:
    with socket.create_connection(server.service_address) as connection:
        connection.sendall(head)
        assert connection.recv(1000).split(b" ")[1][:1] == b"4"


def test_a_request_id_of_the_client_cannot_hold_a_line(server: Served) -> None:
    assert server.get("/health", **{"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.get("/health", **{"x-request-id": "a b"}).headers["x-request-id"] != "a b"


# Pictures


def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel, in very few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def packed(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (packed(png(30_000, 30_000)), "too large"),
        (packed(b"nothing of the kind"), "unsupported"),
        (packed(PICTURE.read_bytes()[:100]), "damaged"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,!!!", "base64"),
        ("data:image/png;base64,é", "base64"),
        ("data:", "no URL"),
        ("data:image/png;base64", "no URL"),
        ("ftp://127.0.0.1/x.png", "no URL"),
        ("javascript:alert(1)", "no URL"),
        ("http://127.0.0.1/x.png", "fetches no pictures"),
        ("HTTPS://example.com/x.png", "fetches no pictures"),
        (f"file://{PICTURE}", "no such file"),
        (str(PICTURE), "no URL"),
        ("../x.png", "no URL"),
    ],
)
def test_pictures_that_are_none_are_refused(server: Served, url: str, said: str) -> None:
    assert said in refusal(server.post(CHAT, with_picture(url)))


def test_a_data_url_may_be_written_in_every_way(server: Served) -> None:
    data = PICTURE.read_bytes()
    plain = base64.b64encode(data).decode()
    expected = server.post(CHAT, with_picture(packed(data))).json()["choices"]
    for url in (
        f"data:;base64,{plain}",
        f"DATA:image/jpeg;charset=utf-8;BASE64,{plain.rstrip('=')}",
        f"data:image/png;base64,{plain[:40]}\n {plain[40:]}",
        "data:image/png;base64," + plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ):
        assert server.post(CHAT, with_picture(url)).json()["choices"] == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may be read is in `media`; a secret lies beside it."""
    root = tmp_path_factory.mktemp("local")
    media = root / "media"
    (media / "deeper").mkdir(parents=True)
    for path in (root / "secret.png", media / "a picture.png", media / "deeper" / "b.png"):
        path.write_bytes(PICTURE.read_bytes())
    (media / "link.png").symlink_to(root / "secret.png")
    (media / "out").symlink_to(root)
    (media / "inner.png").symlink_to(media / "deeper" / "b.png")
    (media / "circle.png").symlink_to(media / "circle.png")
    (media / "words.png").write_text("these are words")
    os.mkfifo(media / "pipe.png")
    (root / "media2").mkdir()
    (root / "media2" / "c.png").write_bytes(PICTURE.read_bytes())
    return root


@pytest.fixture(scope="module")
def open_server(model: Model, folder: Path) -> Iterator[Served]:
    with served(model, media=Media(folder / "media")) as running:
        yield running


@pytest.mark.parametrize(
    "place",
    [
        "media/a%20picture.png",
        "media/deeper/../deeper/b.png",
        "media/inner.png",
        "media/%64eeper/b.png",
        "media2/../media/deeper/b.png",
    ],
)
def test_files_below_the_folder_are_read(open_server: Served, folder: Path, place: str) -> None:
    assert open_server.post(CHAT, with_picture(f"file://{folder}/{place}")).is_success
    assert open_server.post(CHAT, with_picture(f"file://localhost{folder}/{place}")).is_success


@pytest.mark.parametrize(
    "place",
    [
        "secret.png",
        "media/../secret.png",
        "media/%2e%2e/secret.png",
        "media/..%2fsecret.png",
        "media/link.png",
        "media/out/secret.png",
        "media/circle.png",
        "media2/c.png",
        "media/missing.png",
        "media/a%00.png",
        "media/" + "x" * 5000,
    ],
)
def test_files_elsewhere_are_not_and_whether_they_are_there_is_not_told(
    open_server: Served, folder: Path, place: str
) -> None:
    said = refusal(open_server.post(CHAT, with_picture(f"file://{folder}/{place}")))
    assert said.startswith("400 ") and "this server reads no such file" in said


@pytest.mark.parametrize("url", ["file:///etc/passwd", "file://otherhost/x.png", "file:x.png", "file:///", "file://"])
def test_other_file_urls_are_refused_alike(open_server: Served, url: str) -> None:
    assert "this server reads no such file" in refusal(open_server.post(CHAT, with_picture(url)))


@pytest.mark.parametrize("name", ["pipe.png", "words.png", "deeper"])
def test_what_is_no_picture_below_the_folder_is_refused(open_server: Served, folder: Path, name: str) -> None:
    said = refusal(open_server.post(CHAT, with_picture(f"file://{folder}/media/{name}")))
    assert "these are words" not in said


# Keys


@pytest.fixture(scope="module")
def locked(model: Model) -> Iterator[Served]:
    with served(model, ("s3cret-key", "another")) as running:
        yield running


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Bearer s3cret-ke", "Bearer s3cret-keyy", "Basic s3cret-key", "s3cret-key"]
)
def test_without_a_key_nothing_is_answered(locked: Served, header: str) -> None:
    headers = {"authorization": header} if header else {}
    for path in (CHAT, "/tokenize"):
        response = locked.post(path, HARMLESS, **headers)
        assert refusal(response).startswith("401 ")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "s3cret" not in response.text
    assert locked.get("/v1/models", **headers).status_code == 401


@pytest.mark.parametrize("key", ["s3cret-key", "another"])
def test_each_key_opens(locked: Served, key: str) -> None:
    assert locked.client(key).models.list().data
    assert locked.post(CHAT, HARMLESS, authorization=f"bearer {key}").is_success


def test_keys_of_any_bytes_are_compared(locked: Served) -> None:
    with socket.create_connection(locked.service_address) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_whether_it_lives_is_told_without_a_key_and_by_any_name(locked: Served) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert locked.get(path, host="pixtral.example").is_success
    assert locked.client("another").models.list().data
