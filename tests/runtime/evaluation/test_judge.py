"""The judge: what it is asked, what is made of its answers, and what its failures cost. Over HTTP, on this machine."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from helpers.judge_stub import BROKEN, BUSY, Judge, Reply, judge_server
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.judge import JudgeOptions, Rating, judge_messages, rate_answers, rating_averages
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import Message

SECRET = "sk-never-to-be-seen"
STOPPED_RUN = """
import signal
import sys
from pathlib import Path
from pixtral_runtime.evaluation.judge import JudgeOptions, rate_answers
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import Message

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a shell put in the background ignores it
url, picture, path = sys.argv[1:]
pairs = [(Example(str(n), (Message("user", (Path(picture), "?")),), ("A plot.",)), "x") for n in range(4)]
for rating in rate_answers(pairs, Path(path), JudgeOptions(url, parallel=2)):
    print(rating.rating, flush=True)
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("PIXTRAL_JUDGE_KEY", SECRET)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg")
    return tmp_path / "a.jpg"


def turn(name: str, picture: Path, later: bool = False) -> Example:
    first = Message("user", (picture, f"What is {name}?"))
    if not later:
        return Example(name, (first,), ("A plot.",))
    history = (first, Message("assistant", ("A plot.",)), Message("user", ("Of what?",)))
    return Example(name, history, ("Rain.",))


def options(judge: Judge, **changes: float) -> JudgeOptions:
    return JudgeOptions(judge.url, "a-judge", timeout_s=changes.pop("timeout_s", 5.0), **changes)  # type: ignore[arg-type]


def rated(judge: Judge, pairs: Sequence[tuple[Example, str]], path: Path, **changes: float) -> dict[str, Rating]:
    return {rating.id: rating for rating in rate_answers(pairs, path, options(judge, **changes))}


def test_the_judge_reads_the_conversation_its_image_the_references_and_the_answer(picture: Path) -> None:
    system, user = judge_messages(turn("x", picture, later=True), "Snow.")
    assert system == {"role": "system", "content": PROMPTS["judge_system"]}
    before, image, after = user["content"]
    assert PROMPTS["judge_system"].endswith('"Rating: [[5]]".\n\n')
    assert before["text"] == "<|The Start of Conversation with User|>\n\n### User:\n"
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == picture.read_bytes()
    assert after["text"] == (
        "What is x?\n\n### Reference answer:\nA plot.\n\n"
        "### User:\nOf what?\n\n### Reference answer:\nRain.\n\n"
        "\n\n### Assistant's answer:\nSnow.\n\n<|The End of Conversation with User|>\n\n\n"
    )


def test_images_go_as_the_bytes_of_their_files_whatever_their_names(tmp_path: Path) -> None:
    kinds = {"PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "JPEG": "image/jpeg"}
    for format, kind in kinds.items():
        path = tmp_path / f"{format}.jpg"
        Image.new("RGB", (8, 8), "red").save(path, format)
        url = judge_messages(turn("x", path), "Snow.")[1]["content"][1]["image_url"]["url"]
        assert url == f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_images_of_later_turns_stand_where_they_were_shown(picture: Path) -> None:
    example = turn("x", picture, later=True)
    last = Message("user", ("And here: ", picture, " now?"))
    example = replace(example, messages=(*example.messages[:-1], last))
    content = judge_messages(example, "Snow.")[1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert content[2]["text"].endswith("### User:\nAnd here: ")
    assert content[4]["text"].startswith(" now?\n\n### Reference answer:\nRain.")


def test_ratings_are_read_from_answers_and_requests_are_as_the_paper_says(picture: Path, tmp_path: Path) -> None:
    replies = [Reply("[[3]] or rather [[9]]"), Reply("Rating: [[6.5]]")]
    with judge_server(*replies) as judge:
        found = rated(judge, [(turn("a", picture), "x"), (turn("b", picture), "y")], tmp_path / "r.jsonl", parallel=1)
    assert {name: rating.rating for name, rating in found.items()} == {"a": 3.0, "b": 6.5}
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in judge.requests} == {("a-judge", 0.0, 2048)}
    assert set(judge.keys) == {SECRET}
    assert SECRET not in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_a_busy_or_broken_server_is_asked_again(picture: Path, tmp_path: Path) -> None:
    with judge_server(BUSY, BROKEN, BUSY, Reply()) as judge:
        found = rated(judge, [(turn("a", picture), "x")], tmp_path / "r.jsonl")
    assert found["a"].rating == 7 and len(judge.requests) == 4


@pytest.mark.parametrize(
    ("reply", "asked", "said"),
    [
        (BUSY, 3, "429"),
        (BROKEN, 3, "500"),
        (Reply("I cannot rate this."), 2, "no rating in 2 answers"),
        (Reply("Rating: [[good]]"), 2, "no rating in 2 answers"),
        (Reply("Rating: [[85]]"), 2, "no rating in 2 answers"),
        (Reply("Rating: [[0]]"), 2, "no rating in 2 answers"),
        (Reply("too large", 400), 1, "400: "),
        (Reply(body=b"<html>"), 1, "no answer"),
        (Reply(body=b'{"choices": [{"message'), 1, "no answer"),
        (Reply(body=b'{"choices": {"a": 1}}'), 1, "no chat completion"),
        (Reply(body=b'{"choices": []}'), 2, "no rating"),
        (Reply(body=b'{"choices": [{"message": {"content": ["[[5]]"]}}]}'), 2, "no rating"),
        (Reply(seconds=0.1), 3, "timed out"),
    ],
)
def test_a_turn_that_stays_without_a_rating_says_why_and_attempts_are_bounded(
    reply: Reply, asked: int, said: str, picture: Path, tmp_path: Path
) -> None:
    timeout_s = 0.05 if reply.seconds else 5.0
    with judge_server(reply) as judge:
        one = rated(
            judge, [(turn("a", picture), "x")], tmp_path / "r.jsonl", attempts=2, retries=2, timeout_s=timeout_s
        )
    assert one["a"].rating is None and said in str(one["a"].error)
    assert len(judge.requests) == asked


def test_the_others_are_rated_when_one_fails_and_only_that_one_is_asked_again(picture: Path, tmp_path: Path) -> None:
    pairs = [(turn(name, picture), "x") for name in "abcde"]
    path = tmp_path / "r.jsonl"
    with judge_server(Reply("no idea"), Reply()) as judge:
        found = rated(judge, pairs, path, attempts=1, parallel=2)
    assert sorted(str(rating.rating) for rating in found.values()) == ["7.0"] * 4 + ["None"]
    with judge_server() as judge:
        again = rated(judge, pairs, path)
        assert len(judge.requests) == 1
        assert {rating.rating for rating in again.values()} == {7.0}
        rated(judge, pairs, path)
        assert len(judge.requests) == 1
        other = [(example, "another answer") for example, _ in pairs]
        rated(judge, other, path)
        assert len(judge.requests) == 6


def test_an_image_that_is_gone_costs_its_turn_alone(picture: Path, tmp_path: Path) -> None:
    with judge_server() as judge:
        pairs = [(turn("a", tmp_path / "gone.png"), "x"), (turn("b", picture), "x")]
        found = rated(judge, pairs, tmp_path / "r.jsonl")
    assert found["b"].rating == 7 and found["a"].rating is None and "gone.png" in str(found["a"].error)


def test_a_server_that_is_not_there_is_said_with_the_reason(picture: Path, tmp_path: Path) -> None:
    with judge_server() as judge:
        pass
    one = rated(judge, [(turn("a", picture), "x")], tmp_path / "r.jsonl", retries=0)
    assert "refused" in str(one["a"].error)


def test_a_stopped_run_ends_at_once_though_the_server_is_silent(picture: Path, tmp_path: Path) -> None:
    with judge_server(Reply(), Reply(seconds=60.0)) as judge:
        command = [sys.executable, "-c", STOPPED_RUN, judge.url, str(picture), str(tmp_path / "r.jsonl")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and process.stdout.readline() == b"7.0\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
        process.stdout.close()
    assert len((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_stopped_run_keeps_what_was_rated_even_with_a_torn_line(picture: Path, tmp_path: Path) -> None:
    pairs = [(turn(str(n), picture), "x") for n in range(12)]
    path = tmp_path / "r.jsonl"
    with judge_server() as judge:
        ratings = rate_answers(pairs, path, options(judge, parallel=1))
        kept = [next(ratings).id for _ in range(3)]
        ratings.close()  # type: ignore[attr-defined]
        with path.open("a", encoding="utf-8") as file:
            file.write('{"id": "torn')
        before = len(judge.requests)
        found = rated(judge, pairs, path)
    assert len(found) == 12 and {rating.rating for rating in found.values()} == {7.0}
    assert len(judge.requests) - before <= 12 - len(kept)
    ids = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert sorted(ids, key=int) == [str(n) for n in range(12)]


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "export PIXTRAL_JUDGE_KEY"), (404, "judge_url=")],
)
def test_a_refusal_of_every_request_stops_at_once_and_tells_no_key(
    status: int, hint: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXTRAL_JUDGE_KEY", f"{SECRET}\n")  # as a file of secrets has it
    reply = Reply(f"wrong key {SECRET}", status)
    with judge_server(reply) as judge, pytest.raises(InputError) as error:
        rated(judge, [(turn(name, picture), "x") for name in "abcdefgh"], tmp_path / "r.jsonl", parallel=1)
    assert hint in error.value.hint and set(judge.keys) == {SECRET}
    assert SECRET not in "".join(traceback.format_exception(error.value)) + (tmp_path / "r.jsonl").read_text()
    assert len(judge.requests) <= 2


def test_what_can_never_be_asked_is_refused_before_anything_is(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(turn("a", picture), "x")]
    with pytest.raises(InputError, match="no address"):
        list(rate_answers(pairs, tmp_path / "r.jsonl", JudgeOptions("localhost:8000/v1")))
    with judge_server() as judge:
        with pytest.raises(InputError, match="cannot be written"):
            rated(judge, pairs, picture / "r.jsonl")  # whose folder is a file
        monkeypatch.setenv("PIXTRAL_JUDGE_KEY", f"{SECRET}\n{SECRET}")
        with pytest.raises(InputError, match="PIXTRAL_JUDGE_KEY holds") as error:
            rated(judge, pairs, tmp_path / "r.jsonl")
        assert SECRET not in str(error.value) and judge.requests == []


def test_averages_name_what_they_average() -> None:
    rated = [(8.0, "charts", 1), (6.0, "charts", 2), (4.0, "tables", 1)]
    assert rating_averages(rated) == {
        "micro": 6.0,
        "macro_category": 5.5,
        "macro_turn": 6.0,
        "mistral_evals_macro": 5.75,
    }


def test_ratings_are_written_again_where_their_file_vanished(picture: Path, tmp_path: Path) -> None:
    pairs, path = [(turn(name, picture), "x") for name in "abc"], tmp_path / "r.jsonl"
    with judge_server() as judge:
        for rating in rate_answers(pairs, path, options(judge, parallel=1)):
            if rating.id == "b":
                path.unlink()
    assert {json.loads(line)["id"] for line in path.read_text().splitlines()} == {"a", "b", "c"}
