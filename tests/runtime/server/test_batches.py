"""The Batch API as the openai client speaks it: files in, answers out, whatever happens to the server meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from helpers.batches import answers_of, batch_line, ended, jsonl, picture_url, server_process, state_of
from helpers.serving import NAME, Served, served
from pixtral_runtime import Model
from pixtral_runtime.batch.request_file import read_request_file
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.errors import InputError
from pixtral_runtime.server.batch_store import BatchStore
from pixtral_runtime.server.batches import BatchOptions
from pixtral_runtime.server.file_store import FileStore
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.service import Limits, Service, ServiceOptions


@contextmanager
def serving(model: Model, folder: Path, **limits: int) -> Iterator[Served]:
    with served(model, batches=BatchOptions(folder, **limits)) as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(model, tmp_path_factory.mktemp("batches")) as running:
        yield running


def submit(client: OpenAI, *lines: Any, **options: Any) -> Any:
    file = client.files.create(file=("asked.jsonl", jsonl(*lines)), purpose="batch")
    asked: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file.id, **asked)


def upload(server: Served, body: bytes, **headers: str) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/files", content=body, headers=headers, timeout=60)


def mixed() -> list[dict[str, Any]]:
    """Requests of every kind, some of which cannot be answered."""
    lines = [batch_line(f"{number}", picture_url(number % 3), max_tokens=4 + number % 5) for number in range(8)]
    lines += [
        batch_line("drawn", picture_url(0), temperature=1.2, seed=5, logprobs=True, top_logprobs=2),
        batch_line("stopped", picture_url(1), stop=["e"]),
        batch_line("formed", response_format={"type": "json_object"}),
        batch_line("small", picture_url(2), detail="low"),
        batch_line("several", n=2),
        batch_line("broken", "data:image/png;base64,AAAA"),
        batch_line("biased", logit_bias={"9999999": 1}),
        batch_line("elsewhere", "http://127.0.0.1/x.png"),
    ]
    return lines


def test_a_batch_is_uploaded_answered_and_read(server: Served, model: Model, tmp_path: Path) -> None:
    client, lines = server.client(), mixed()
    batch = submit(client, *lines, metadata={"who": "me"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"who": "me"})
    batch = ended(client, batch.id)
    assert (batch.status, batch.errors, batch.model) == ("completed", None, NAME)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (16, 12, 4)
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at and not batch.failed_at
    assert batch.expires_at == batch.created_at + 24 * 60 * 60

    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert [one["custom_id"] for one in output] == [one["custom_id"] for one in lines[:12]]
    assert [one["custom_id"] for one in errors] == [one["custom_id"] for one in lines[12:]]
    assert {one["response"]["status_code"] for one in errors} == {400}
    bodies = {one["custom_id"]: one["response"]["body"] for one in errors}
    assert (bodies["several"]["error"]["param"], bodies["biased"]["error"]["param"]) == ("n", "logit_bias")
    assert bodies["elsewhere"]["error"]["param"] == "messages[0]" or "elsewhere" in str(bodies["elsewhere"])
    described = client.files.retrieve(batch.output_file_id)
    assert (described.purpose, described.object, described.status) == ("batch_output", "file", "processed")
    assert described.bytes == len(client.files.content(batch.output_file_id).content)

    for one in (output[0], output[8], output[9], output[10], output[11]):  # as the chat API answers
        asked = next(line["body"] for line in lines if line["custom_id"] == one["custom_id"])
        live = server.post("/v1/chat/completions", asked).json()
        assert live["choices"] == one["response"]["body"]["choices"], one["custom_id"]
        assert set(live) == set(one["response"]["body"])
        read, made = (body["usage"] for body in (live, one["response"]["body"]))
        assert (read["prompt_tokens"], read["total_tokens"]) == (made["prompt_tokens"], made["total_tokens"])

    path = tmp_path / "asked.jsonl"
    path.write_bytes(jsonl(*lines[:12]))
    run = Worker(model.bundle.path, server.service.batches.worker._with.settings, WorkerOptions(batch=2))  # type: ignore[union-attr]
    records = {one.id: one for one in run.job(read_request_file(path, max_new_tokens=9), {}).records()}
    for one in output:
        message = one["response"]["body"]["choices"][0]["message"]
        assert message["content"] == records[one["custom_id"]].answer


def test_files_and_batches_are_listed_page_by_page(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        client = server.client()
        made = [client.files.create(file=(f"{name}.jsonl", b"{}"), purpose="batch").id for name in "abc"]
        assert [file.id for file in client.files.list(limit=2)] == made[::-1]
        assert [file.id for file in client.files.list(order="asc", purpose="batch")] == made
        assert client.files.list(purpose="batch_output").data == []
        page = client.files.list(limit=2, after=made[2])
        assert ([file.id for file in page.data], page.has_more) == ([made[1], made[0]], False)
        assert client.files.retrieve(made[0]).filename == "a.jsonl"
        assert client.files.delete(made[0]).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made[0])
        asked: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batches = [client.batches.create(input_file_id=made[1], **asked).id for _ in range(3)]
        assert [batch.id for batch in client.batches.list(limit=2)] == batches[::-1]
        assert [ended(client, id).status for id in batches] == ["failed"] * 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ("empty_file", None, None)),
        (b"\n\n", ("empty_file", None, None)),
        (b"nonsense", ("invalid_json_line", 1, None)),
        (b"[1]\n", ("invalid_json_line", 1, None)),
        (jsonl(batch_line("a")) + b"{\n", ("invalid_json_line", 2, None)),
        (jsonl(batch_line("a"), batch_line("a")), ("duplicate_custom_id", 2, "custom_id")),
        (jsonl(batch_line("a") | {"url": "/v1/embeddings"}), ("url_mismatch", 1, "url")),
        (jsonl(batch_line("a") | {"method": "GET"}), ("invalid_value", 1, "method")),
        (jsonl(batch_line("a") | {"body": None}), ("missing_required_parameter", 1, "body")),
        (jsonl(batch_line("a", model="gpt-4o")), ("model_mismatch", 1, "body.model")),
        (jsonl(*(batch_line(str(number)) for number in range(31))), ("too_many_tasks", 31, None)),
        (b"\xff\xfe\x00", ("invalid_file", None, None)),
    ],
)
def test_a_file_that_is_no_batch_is_refused_with_the_line(
    data: bytes, expected: tuple[Any, ...], model: Model, tmp_path: Path
) -> None:
    with serving(model, tmp_path, requests=30) as server:
        client = server.client()
        file = client.files.create(file=("x.jsonl", data), purpose="batch")
        asked: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = ended(client, client.batches.create(input_file_id=file.id, **asked).id)
        assert (batch.status, batch.output_file_id, batch.errors.object) == ("failed", None, "list")
        (error,) = batch.errors.data
        assert (error.code, error.line, error.param) == expected
        assert error.message and str(tmp_path) not in error.message and batch.failed_at


def test_what_cannot_be_kept_or_begun_is_refused(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path, file_bytes=1000, files=3, batches=1) as server:
        client = server.client()
        with pytest.raises(openai.APIStatusError, match="longer than the 1,000 bytes") as caught:
            client.files.create(file=("x.jsonl", b"x" * 1001), purpose="batch")
        assert caught.value.status_code == 413
        assert client.files.create(file=("../../x.jsonl", b"x" * 1000), purpose="batch").filename == "../../x.jsonl"
        with pytest.raises(openai.BadRequestError, match="purpose: expected"):
            client.files.create(file=("x.jsonl", b"x"), purpose="vision")
        broken = "multipart/form-data; boundary=x"
        for kind, body, status in (
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"", 415),
            (broken, b"nothing of a form", 400),
            (broken, b"--x\r\n\r\nno end", 400),
            (broken, b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n', 400),
        ):
            assert upload(server, body, **{"content-type": kind}).status_code == status, body
        part = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        assert upload(server, part + b"b" * 66_000, **{"content-type": broken}).status_code == 413
        assert upload(server, (part + b"\r\n") * 17 + b"--x--", **{"content-type": broken}).status_code == 400
        origin = {"content-type": broken, "origin": "http://elsewhere.example"}
        assert upload(server, b"", **origin).status_code == 403
        assert len(list((tmp_path / "files").iterdir())) == 2  # nothing is left of the others

        for _ in range(2):
            client.files.create(file=("x.jsonl", b"{}"), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="3 files are kept here"):
            client.files.create(file=("x.jsonl", b"{}"), purpose="batch")
        for path in ("/v1/files/..%2Fbatches", "/v1/files/file-0/content", "/v1/files/%2e%2e", "/v1/batches/batch_0"):
            assert server.get(path).status_code == 404
        right = {"input_file_id": client.files.list().data[0].id, "endpoint": "/v1/chat/completions"}
        right |= {"completion_window": "24h"}
        for change, field in (
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"input_file_id": "file-0"}, "input_file_id"),
            ({"input_file_id": "../x"}, "input_file_id"),
            ({"metadata": {"a": 1}}, "metadata"),
            ({"output_expires_after": {"seconds": 3600}}, "output_expires_after"),
        ):
            answer = server.post("/v1/batches", right | change)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        first = ended(client, server.post("/v1/batches", right).json()["id"])
        second = server.post("/v1/batches", right).json()  # takes the first one's place
        assert server.get(f"/v1/batches/{first.id}").status_code == 404
        assert ended(client, second["id"]).status == "failed"
        assert server.post(f"/v1/batches/{second['id']}/cancel", {}).json()["error"]["code"] == "invalid_status"


def test_a_server_without_a_folder_says_what_it_takes(model: Model) -> None:
    with served(model) as server:
        for path in ("/v1/files", "/v1/batches", "/v1/files/x", "/v1/batches/x"):
            answer = server.get(path)
            assert answer.status_code == 404 and "batch_api_dir=DIR" in answer.json()["error"]["message"]


def test_a_folder_is_one_servers_at_a_time(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path), pytest.raises(InputError, match="in use by another server"):
        Service(model, ServiceOptions(NAME, batches=BatchOptions(tmp_path)))


ENDLESS: dict[str, Any] = {"logit_bias": {"2": -100}}  # the token that ends an answer


def long_lines(count: int, tokens: int) -> list[dict[str, Any]]:
    return [batch_line(f"{n}", picture_url(n) if n % 4 else None, max_tokens=tokens, **ENDLESS) for n in range(count)]


def test_a_live_request_waits_for_no_batch_and_no_batch_takes_its_place(model: Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"slots": 2, "limits": Limits(queue=0)}
    with served(model, batches=BatchOptions(tmp_path), **options) as server:
        client = server.client()
        batch = submit(client, *long_lines(24, 60))
        while not (before := state_of(client, batch.id)).request_counts.completed:
            assert before.status in ("validating", "in_progress")
        live = server.post("/v1/chat/completions", batch_line("live")["body"])
        after = state_of(client, batch.id)
        assert live.status_code == 200
        assert after.status == "in_progress" and after.request_counts.completed < 24
        assert ended(client, batch.id).request_counts.completed == 24


def test_a_batch_that_is_cancelled_keeps_its_answers(model: Model, tmp_path: Path) -> None:
    with served(model, batches=BatchOptions(tmp_path), slots=2) as server:
        client = server.client()
        first, second = submit(client, *long_lines(24, 60)), submit(client, *long_lines(24, 60))
        assert client.batches.cancel(second.id).status == "cancelling"
        while not state_of(client, first.id).request_counts.completed:
            pass
        with pytest.raises(openai.BadRequestError, match="is the input of batch_"):
            client.files.delete(first.input_file_id)
        assert client.batches.cancel(first.id).status == "cancelling"
        batch = ended(client, first.id)
        assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
        assert 0 < batch.request_counts.completed < 24 == batch.request_counts.total
        output = answers_of(client.files.content(batch.output_file_id).text)
        assert len(output) == batch.request_counts.completed
        assert batch.error_file_id is None
        batch = ended(client, second.id)
        assert (batch.status, batch.output_file_id) == ("cancelled", None)
        assert client.files.delete(batch.input_file_id).deleted


def prepared(folder: Path, *lines: Any) -> tuple[BatchStore, Any]:
    """A folder as a server leaves it that has just taken a batch."""
    files, batches = FileStore(folder / "files"), BatchStore(folder / "batches")
    upload = files.new_upload()
    upload.write_bytes(jsonl(*lines))
    file = files.adopt(upload, "asked.jsonl")
    return batches, batches.create(file.id, "/v1/chat/completions", NAME, None, 10)


def test_a_batch_whose_time_is_over_says_what_was_not_asked(model: Model, tmp_path: Path) -> None:
    batches, batch = prepared(tmp_path, *long_lines(3, 2))
    batches.change(batch.id, "in_progress", total=3, expires_at=1)
    with serving(model, tmp_path) as server:
        client = server.client()
        found = ended(client, batch.id)
        assert found.status == "expired" and found.expired_at and found.output_file_id is None
        lines = [json.loads(line) for line in client.files.content(found.error_file_id).text.splitlines()]
        assert [line["custom_id"] for line in lines] == ["0", "1", "2"]
        assert {(line["response"], line["error"]["code"]) for line in lines} == {(None, "batch_expired")}


def test_a_server_goes_on_from_any_state_that_another_left(model: Model, tmp_path: Path) -> None:
    _, batch = prepared(tmp_path, *long_lines(3, 2), batch_line("n", n=2))
    with serving(model, tmp_path) as server:  # left in "validating"
        client = server.client()
        first = ended(client, batch.id)
        assert first.status == "completed"
        output = client.files.content(first.output_file_id).content
        errors = client.files.content(first.error_file_id).content
    state = tmp_path / "batches" / f"{batch.id}.json"
    for status in ("finalizing", "in_progress"):  # killed before the last step, or before the one before
        fields = json.loads(state.read_text()) | {"status": status, "output_file_id": None, "completed_at": None}
        state.write_text(json.dumps(fields))
        (tmp_path / "files" / f"{first.output_file_id}.json").unlink()
        (tmp_path / "files" / ".0123.tmp").write_bytes(b"half of a file")
        with serving(model, tmp_path) as server:
            client = server.client()
            again = ended(client, batch.id)
            assert (again.status, again.output_file_id) == ("completed", first.output_file_id)
            assert client.files.content(again.output_file_id).content == output
            assert client.files.content(again.error_file_id).content == errors
        assert not (tmp_path / "files" / ".0123.tmp").exists()


def test_a_batch_of_other_settings_fails_and_says_so(model: Model, tmp_path: Path) -> None:
    _, batch = prepared(tmp_path, *long_lines(2, 2))
    with serving(model, tmp_path) as server:
        assert ended(server.client(), batch.id).status == "completed"
    BatchStore(tmp_path / "batches").change(batch.id, "in_progress")
    with served(model, batches=BatchOptions(tmp_path), media=Media(apply_exif=False)) as server:
        found = ended(server.client(), batch.id)
        assert found.status == "failed" and "exif was true and is false" in found.errors.data[0].message


def test_a_server_that_is_killed_loses_no_answer_and_asks_none_twice(model: Model, tmp_path: Path) -> None:
    lines = long_lines(24, 60)
    with serving(model, tmp_path / "whole") as server:
        client = server.client()
        whole = ended(client, submit(client, *lines).id)
        expected = answers_of(client.files.content(whole.output_file_id).text)
        assert len(expected) == 24
    folder = tmp_path / "killed"
    with server_process(model.bundle.path, folder, "--batch", "2", "--served-model-name", NAME) as (process, client):
        batch = submit(client, *lines)
        results = folder / "batches" / f"{batch.id}.results.jsonl"
        while not results.exists() or results.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
        process.kill()
        process.wait()
    before = results.read_bytes()
    assert 5 <= before.count(b"\n") < 24, "the batch was over before the kill"
    with serving(model, folder) as server:
        client = server.client()
        found = ended(client, batch.id)
        assert (found.status, found.request_counts.completed) == ("completed", 24)
        assert answers_of(client.files.content(found.output_file_id).text) == expected
    assert results.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert results.read_bytes().count(b"\n") == 24


def test_a_batch_whose_check_fails_by_a_bug_keeps_nobody_waiting(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pixtral_runtime.server.batch_worker.check_input", fail)
    batch = ended(server.client(), submit(server.client(), batch_line("one")).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "server_error")
    assert "a bug" not in batch.errors.data[0].message
