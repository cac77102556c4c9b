"""What goes to a judge's server, and how much is taken from one that is hostile. Over HTTP, on this machine."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from PIL import Image

from helpers.judge_stub import Reply, judge_server
from pixtral_runtime.errors import InputError, SettingError
from pixtral_runtime.evaluation.judge import JudgeOptions, Rating, rate_answers
from pixtral_runtime.evaluation.judge_client import LARGEST_ANSWER_BYTES, open_client
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import Message

OPENAI, OWN = "https://api.openai.com/v1", "https://judge.example/v1"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    monkeypatch.setenv("OPENAI_ORG_ID", "an-organization")
    monkeypatch.delenv("PIXTRAL_JUDGE_KEY", raising=False)


@pytest.fixture
def pairs(tmp_path: Path) -> list[tuple[Example, str]]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return [(Example("a", (Message("user", (tmp_path / "a.png", "What?")),), ("A plot.",)), "Snow.")]


def rated(url: str, pairs: list[tuple[Example, str]], tmp_path: Path, **changes: float) -> Rating:
    options = JudgeOptions(url, "a-judge", retries=0, **changes)  # type: ignore[arg-type]
    return next(iter(rate_answers(pairs, tmp_path / "r.jsonl", options)))


@pytest.mark.parametrize(
    ("url", "judge_key", "sent"),
    [
        (OPENAI, None, "openais"),
        (OPENAI, "own", "own"),
        (OWN, None, "none"),
        (OWN, "own", "own"),
        ("http://judge.example/v1", None, "none"),
        ("http://127.0.0.1:8000/v1", "own", "own"),
        ("http://[::1]/v1", "own", "own"),
        ("http://localhost/v1", "own", "own"),
        ("https://api.openai.com.judge.example/v1", None, "none"),
        ("https://api.openai.com@judge.example/v1", None, "none"),
    ],
)
def test_a_key_goes_to_the_server_that_it_is_meant_for(
    url: str, judge_key: str | None, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if judge_key:
        monkeypatch.setenv("PIXTRAL_JUDGE_KEY", judge_key)
    client = open_client(url, 5.0, 0)
    assert client.api_key == sent
    assert (client.organization is not None) == (url == OPENAI)


@pytest.mark.parametrize("url", ["http://judge.example/v1", "http://10.0.0.1/v1", "http://localhost.example/v1"])
def test_no_key_goes_over_the_network_for_everybody_to_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXTRAL_JUDGE_KEY", "own")
    with pytest.raises(InputError, match="PIXTRAL_JUDGE_KEY would go to") as caught:
        open_client(url, 5.0, 0)
    assert caught.value.hint.startswith("judge_url=https://")


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://a/v1", "https:///v1", "http://[::1/v1", "http://a:b/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingError, match="no address"):
        open_client(url, 5.0, 0)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_and_never_followed(status: int, pairs: list[tuple[Example, str]], tmp_path: Path) -> None:
    with judge_server() as other:
        moved = Reply("elsewhere", status, {"Location": f"{other.url}/chat/completions"})
        with judge_server(moved) as judge, pytest.raises(InputError, match="sends everybody elsewhere") as caught:
            rated(judge.url, pairs, tmp_path)
        assert other.requests == []
        assert f"judge_url={other.url}" in caught.value.hint


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(body=b" " * (LARGEST_ANSWER_BYTES + 1)), "more than 4,194,304 bytes"),
        (Reply(body=gzip.compress(b" " * 10**6), headers={"Content-Encoding": "gzip"}), "packed by gzip"),
    ],
)
def test_an_answer_has_an_end(
    status: int, reply: Reply, said: str, pairs: list[tuple[Example, str]], tmp_path: Path
) -> None:
    with judge_server(Reply(status=status, body=reply.body, headers=reply.headers)) as judge:
        rating = rated(judge.url, pairs, tmp_path)
    assert (rating.rating, said in str(rating.error)) == (None, True), rating.error


def test_all_tries_together_have_a_deadline(pairs: list[tuple[Example, str]], tmp_path: Path) -> None:
    with judge_server(Reply(seconds=60.0)) as judge:
        rating = rated(judge.url, pairs, tmp_path, timeout_s=60.0, deadline_s=0.05)
    assert "no answer in 0 s" in str(rating.error)
