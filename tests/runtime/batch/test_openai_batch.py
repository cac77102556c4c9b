"""OpenAI's batch format in request files, and its output."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.places import DEMO, ROOT
from helpers.results import SETTINGS, answered
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime.batch.openai_output import not_asked, output_of
from pixtral_runtime.batch.records import OwnSettings, Record, Request, Settings
from pixtral_runtime.batch.request_file import read_request_file, read_requests
from pixtral_runtime.errors import ImageError, InputError
from pixtral_runtime.generation.sampling import Sampling
from pixtral_runtime.inputs.conversation import Message, StoredPicture, user_message
from pixtral_runtime.inputs.data_url import HeldUrl, UrlInFile
from pixtral_runtime.inputs.image_files import SmallFile, picture_file

PICTURE = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))[0]
URL = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"


def line(id: str = "a", *content: Any, **body: Any) -> dict[str, Any]:
    """As OpenAI's guide to its Batch API writes it."""
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is shown?"}]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, **body}
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def shown(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def read(*lines: Any) -> list[Request]:
    return read_requests(map(json.dumps, lines), "b.jsonl", max_new_tokens=64, folder=Path("data"))


def test_a_line_is_a_request_with_what_it_says_of_its_answer() -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "#", "logit_bias": {"42": -100}}
    formed = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    (request,) = read(line("a", shown("x.png"), **options, logprobs=True, top_logprobs=2, response_format=formed))
    own = OwnSettings("tiny", 0.5, 0.9, 7, ("#",), 2, ((42, -100.0),), '{"type": "object"}')
    assert request == Request("a", (Message("user", (Path("data/x.png"), "What is shown?")),), 4, own)
    assert read(line(max_tokens=None))[0].max_new_tokens == 64
    assert read(line(), {"id": "b", "prompt": "Ours"})[1] == Request("b", user_message("Ours"), 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "GET"}, 'method: expected "POST", found "GET"'),
        ({"url": "/v1/embeddings"}, 'url: expected "/v1/chat/completions", found "/v1/embeddings"'),
        ({"custom_id": 3}, "custom_id: expected a string, found 3"),
        ({"body": []}, "body: expected an object"),
        ({"body": None}, "body is missing"),
        ({"custom": 1}, "unknown key 'custom'"),
        ({"n": 2}, "n: 2 answers"),
        ({"stream": True}, "stream: a batch has nobody"),
        ({"tools": [{}]}, "tools: "),
        ({"presence_penalty": 1}, "presence_penalty: 1 cannot be honoured"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: the last is not the user's"),
    ],
)
def test_what_cannot_be_done_is_refused_by_line_and_field(change: dict[str, Any], words: str) -> None:
    is_envelope = set(change) <= {"custom_id", "method", "url", "body", "custom"}
    wrong = line() | change if is_envelope else line("b", **change)
    with pytest.raises(InputError) as caught:
        read(line("first"), wrong)
    assert str(caught.value).startswith("b.jsonl, line 2: ") and words in str(caught.value)


def test_an_id_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match="line 2: the id 'a' was there before"):
        read(line(), line())


def test_pictures_that_are_data_stay_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PICTURE.read_bytes())
    ours = {"id": "c", "prompt": "What?", "images": [URL]}
    asked = line("b", shown("x.png"), shown(URL, detail="low"), shown("x.png", detail="low"))
    path = write(tmp_path / "b.jsonl", line("a", shown(URL)), asked, ours)
    as_php = json.dumps(line("d", shown(URL))).replace("/", "\\/")
    odd = json.dumps(line("e", shown(URL))).replace("data:", "d\\u0061ta:")
    path.write_text(f"\ufeff{path.read_text()}{as_php}\n\n{odd}\n", encoding="utf-8")
    requests = read_request_file(path, max_new_tokens=4)
    images = [image for request in requests for image in request.images]
    assert all(picture_file(image) == PICTURE.read_bytes() for image in images)
    kinds = [UrlInFile, type(tmp_path), UrlInFile, SmallFile, UrlInFile, UrlInFile, HeldUrl]
    assert [type(image) for image in images] == kinds
    stored = [image for image in images if isinstance(image, StoredPicture)]
    assert [image.is_small for image in stored] == [False, True, True, False, False, False]
    assert all(len(image.name) <= 60 for image in stored if isinstance(image, UrlInFile))
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-8")
    with pytest.raises(ImageError, match=r"b\.jsonl was changed"):
        picture_file(stored[0])


def test_what_a_request_says_is_part_of_the_question_and_a_plain_one_stays_the_same() -> None:
    plain = Request("a", user_message("q", [Path("x.png")]))
    assert plain.asked(Settings("bundle")) == "b7828d03662e2f57"
    own = [replace(plain, own=one) for one in (OwnSettings(), OwnSettings(seed=1), OwnSettings(stops=("a",)))]
    assert len({one.asked(SETTINGS) for one in (plain, *own)}) == 4
    small = Request("a", user_message("q", [SmallFile(name="x.png", file=Path("x.png"))]))
    assert small.asked(SETTINGS) != plain.asked(SETTINGS)


def test_a_seed_of_a_request_is_taken_as_it_is() -> None:
    settings = Settings("bundle", temperature=0.4, seed=3)
    plain = Request("a", ())
    assert settings.sampling(replace(plain, own=OwnSettings(seed=-1))) == Sampling(0.4, 0.8, 2**64 - 1)
    assert settings.sampling(replace(plain, own=OwnSettings(temperature=1.0, top_p=0.5, seed=7))) == Sampling(1, 0.5, 7)
    assert settings.sampling(replace(plain, own=OwnSettings())) == settings.sampling(plain)


def test_a_record_becomes_a_completion_or_an_error() -> None:
    request = Request("a", user_message("q"), own=OwnSettings("tiny", seed=1))
    record = answered(request)
    record.prompt_tokens, record.image_tokens, record.reused_tokens = 10, 4, 2
    found = output_of(record, created_s=5)
    assert (found["custom_id"], found["error"]) == ("a", None)
    response = found["response"]
    assert (response["status_code"], response["body"]["object"]) == (200, "chat.completion")
    assert response["body"]["model"] == "tiny" and response["body"]["created"] == 5
    message = {"role": "assistant", "content": "A cat.", "refusal": None}
    assert response["body"]["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert response["body"]["usage"]["total_tokens"] == 13
    assert output_of(record, created_s=5) == found != output_of(record, created_s=5, batch="another")

    record = Record.from_dict(record.to_dict())
    record.error, record.hint, record.status, record.param = "seed: no", "another", 400, "seed"
    failed = output_of(record, created_s=5)
    assert failed["error"] is None and failed["response"]["status_code"] == 400
    error = {"message": "seed: no (another)", "type": "invalid_request_error", "param": "seed", "code": None}
    assert failed["response"]["body"] == {"error": error}
    assert not_asked("a", "batch", "batch_expired", "late") == {
        "id": not_asked("a", "batch", "", "")["id"],
        "custom_id": "a",
        "response": None,
        "error": {"code": "batch_expired", "message": "late"},
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32", max_context=600)).path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_batch_file_is_run_resumed_in_shards_and_merged(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PICTURE.read_bytes())
    lines = [
        line("plain", shown(URL)),
        line("stopped", shown("x.png"), stop=["e"], max_tokens=8),
        line("drawn", shown(URL, detail="low"), temperature=1.5, seed=3, logprobs=True, top_logprobs=1),
        line("formed", response_format={"type": "json_object"}),
        line("biased", logit_bias={"999999": 1}),
        line("broken", shown("data:image/png;base64,AAAA")),
    ]
    path = write(tmp_path / "b.jsonl", *lines)
    asked = ("run", bundle, "--requests", path, "--batch", 2, "--format", "openai")
    out = tmp_path / "r.jsonl"
    done = run(*asked, "-o", out)
    assert done.exit_code == 5, done.output
    output = tmp_path / "r.openai.jsonl"
    found = [json.loads(one) for one in output.read_text(encoding="utf-8").splitlines()]
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in lines]
    assert [one["response"]["status_code"] for one in found] == [200, 200, 200, 200, 400, 400]
    bodies = [one["response"]["body"] for one in found]
    assert "e" not in bodies[1]["choices"][0]["message"]["content"]
    assert len(bodies[2]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert bodies[2]["usage"]["prompt_tokens"] < bodies[0]["usage"]["prompt_tokens"] + 300
    assert bodies[4]["error"]["param"] == "logit_bias" and "999999" in bodies[4]["error"]["message"]
    records = [json.loads(one) for one in out.read_text(encoding="utf-8").splitlines()]
    (image,) = next(one for one in records if one["id"] == "plain")["images"]
    assert image["path"].startswith("data:image/png;base64,iVBOR") and len(image["path"]) <= 60 and image["sha256"]

    refused = run(*asked, "-o", out)
    assert refused.exit_code == 3 and "exists" in refused.stderr
    again = run(*asked, "-o", out, "--resume", "--json")
    assert json.loads(again.stdout)["kept"] == 6
    write(path, *lines[:2], line("drawn", temperature=1.5, seed=4))
    other = run(*asked, "-o", out, "--resume")
    assert other.exit_code == 3 and "something else for" in other.stderr

    write(path, *lines)
    for part in (1, 2):
        assert run(*asked, "--shard", f"{part}/2", "-o", tmp_path / f"{part}.jsonl").exit_code == 5
    assert run("merge", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "-o", tmp_path / "all.openai.jsonl").exit_code == 0
    merged = [json.loads(one) for one in (tmp_path / "all.openai.jsonl").read_text(encoding="utf-8").splitlines()]
    assert answers_of(merged) == answers_of(found)


def answers_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    bodies = {one["custom_id"]: one["response"]["body"] for one in lines}
    return {id: body.get("choices") or body["error"] for id, body in bodies.items()}
