"""A server as its clients see it: what is asked, what counts, and what is said of requests that were not answered."""

from __future__ import annotations

import base64
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.chat_stub import (
    BUSY,
    DONE,
    STREAM,
    USAGE,
    WORDS,
    Reply,
    chat_server,
    chunk,
    failure,
    model_list,
    usage_chunk,
)
from pixtral_cli.main import app
from pixtral_runtime.bench.cases import Case, Effort, knee
from pixtral_runtime.bench.chat_client import API_KEY, Answer, ChatServer
from pixtral_runtime.bench.plots import draw_plots
from pixtral_runtime.bench.report import Report, compare_reports, read_report, request_lines
from pixtral_runtime.bench.serving import Tally, case_samples, run_server_benchmark
from pixtral_runtime.errors import InputError

ONE = Case("latency", 1, 4, 16)
TWO = Case("throughput", 2, 4, 16)
FAST = Case("serve", 0, 4, 16, rate=1e5)
BROKEN = Reply(STREAM[:3], cut=True)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (API_KEY, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def measured(url: str, *cases: Case, effort: Effort | None = None, **options: Any) -> Report:
    return run_server_benchmark(ChatServer(url), "a-model", cases, effort or Effort(3, 0, 1), **options)


def answer(end: float, *pieces: float, tokens: int = 3, asked: float = 0.0, **more: Any) -> Answer:
    return Answer(asked, end, pieces, pieces[-1] if pieces else 0.0, completion_tokens=tokens, **more)


def pictures_in(request: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]


def test_a_request_is_openais_and_asks_for_a_stream_with_usage() -> None:
    with chat_server() as chat:
        measured(chat.url, Case("latency", 1, 7, 16, prompt_tokens=40), effort=Effort(1, 0, 0))
    request = chat.requests[0]
    content = request["messages"][0]["content"]
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "model": "a-model",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert len(content[1]["text"].split()) == 40 and content[1]["text"].endswith("in one short sentence.")
    kind, _, data = pictures_in(request)[0].partition(",")
    assert kind == "data:image/jpeg;base64" and base64.b64decode(data)[:2] == b"\xff\xd8"


def test_no_two_requests_share_picture_or_text_in_all_cases_of_a_run() -> None:
    long = Case("latency", 1, 4, 16, prompt_tokens=40)
    with chat_server() as chat:
        measured(chat.url, long, Case("throughput", 2, 4, 16, prompt_tokens=40))
    sent = [json.dumps(request["messages"]) for request in chat.requests]
    assert len(sent) == (1 + 4) + (1 + 8)  # one ahead of each case, and a run of the warm-up
    assert len(set(sent)) == len(sent) == len({pictures_in(request)[0] for request in chat.requests})
    with chat_server() as again, chat_server() as other:
        measured(again.url, long)
        measured(other.url, long, seed=1)
    assert [json.dumps(request["messages"]) for request in again.requests] == sent[:5]
    assert not {json.dumps(request["messages"]) for request in other.requests} & set(sent)


def test_pictures_of_ones_own_go_as_they_are_and_are_counted_where_they_come_again(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for shade, path in enumerate(paths):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    with chat_server() as chat:
        report = measured(chat.url, Case("latency", 1, 4), folder=paths)
    sent = {pictures_in(request)[0] for request in chat.requests}
    assert sent == {"data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths}
    assert report.results[0].server["sent_again"] == 3
    assert any("3 pictures had been sent before" in remark for remark in report.remarks)


def test_every_mode_has_its_samples_and_the_report_reads_back(tmp_path: Path) -> None:
    with chat_server() as chat:
        report = measured(chat.url, ONE, TWO, FAST)
    one, two, fast = report.results
    assert {name: len(values) for name, values in one.samples.items()} == {"ttft": 3, "tpot": 3, "e2e": 3, "step": 9}
    assert {name: len(values) for name, values in two.samples.items()} == {
        "ttft": 6, "tpot": 6, "e2e": 6, "step": 18, "requests_per_s": 3, "tokens_per_s": 3,
    }  # fmt: skip
    assert (len(fast.samples["e2e"]), fast.server["reasons"]) == (32, {})
    assert len(fast.samples["requests_per_s"]) == 1
    for result in report.results:
        assert all(0 < ttft < e2e for ttft, e2e in zip(result.samples["ttft"], result.samples["e2e"], strict=True))
        assert result.tokens == {"prompt": 30, "new": 4}
        assert (result.server["answered"], result.server["failed"]) == (result.server["requests"], 0)
    assert two.samples["tokens_per_s"] == pytest.approx([4 * rate for rate in two.samples["requests_per_s"]])
    assert report.setting == report.setting | {"server": chat.url[7:-3], "model": "a-model", "seed": 0}
    report.save(tmp_path / "r.json")
    assert read_report(tmp_path / "r.json").results == report.results
    changes = compare_reports(report, report, 0.05)
    assert {(change.case, change.stage) for change in changes} >= {(TWO.name, "tokens_per_s"), (FAST.name, "ttft")}
    assert knee([fast]) is None  # nobody answers a hundred thousand a second


def test_serve_lasts_as_long_as_asked() -> None:
    with chat_server() as chat:
        measured(chat.url, Case("serve", 0, 4, 16, rate=1000), effort=Effort(min_seconds=0.05))
    assert len(chat.requests) == 1 + 50


def test_samples_are_in_the_order_of_the_ends_and_rates_go_from_end_to_end() -> None:
    answers = [answer(8, 2, 4, 6, tokens=5, asked=1), answer(3, 1, 2), answer(5, 2, 3), answer(6, 4, 5, asked=3)]
    samples = case_samples(TWO, answers, 1.0)
    assert samples["e2e"] == [3000, 5000, 3000, 7000] and samples["ttft"] == [1000, 2000, 1000, 1000]
    assert samples["tpot"] == [500, 500, 500, 1000]  # (6 - 2) s over the 4 tokens after the first
    assert samples["step"] == [1000, 1000, 1000, 2000, 2000]
    assert samples["requests_per_s"] == [2 / 4, 2 / 3] and samples["tokens_per_s"] == [6 / 4, 8 / 3]
    assert case_samples(FAST, answers, 0.0)["requests_per_s"] == [4 / 8]
    assert "requests_per_s" not in case_samples(ONE, answers, 0.0)
    assert case_samples(TWO, [], 0.0) == {}


def test_the_warm_up_counts_neither_as_an_answer_nor_as_time() -> None:
    class Even(ChatServer):
        """A server that answers one request a second."""

        def ask(self, body: bytes, asked_s: float | None = None) -> Answer:
            before = next(seconds)
            return answer(before + 1, before + 0.5, asked=before)

    seconds = count()
    server = Even("http://127.0.0.1/v1", clock=lambda: 1.0)  # when the one that goes ahead is answered
    (result,) = run_server_benchmark(server, "m", [Case("throughput", 1, 3, 16)], Effort(3, 0, 2)).results
    assert result.samples["requests_per_s"] == [1, 1, 1] and result.samples["e2e"] == [1000] * 3


def test_who_is_refused_waits_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("pixtral_runtime.bench.serving.time.sleep", waited.append)
    with chat_server(Reply(), BUSY, Reply()) as chat:
        measured(chat.url, ONE, effort=Effort(3, 0, 0))
    assert waited == [0.001, 0, 0]


def test_an_answer_that_came_at_once_has_no_time_a_token() -> None:
    samples = case_samples(ONE, [answer(2, 1.0)], 0.0)
    assert samples["tpot"] == samples["step"] == [] and samples["ttft"] == [1000]
    tally = Tally.of([answer(2, 1.0)], 3)
    assert "1 of 1 answers came in one piece" in " ".join(tally.remarks("a case"))


def test_refusals_and_failures_are_counted_apart_each_with_its_reason() -> None:
    with chat_server(Reply(), BUSY, BROKEN, Reply()) as chat:
        report = measured(chat.url, ONE, effort=Effort(5, 0, 0))
    (result,) = report.results
    assert len(result.samples["e2e"]) == 3
    assert result.server | {"requests": 5, "answered": 3, "refused": 1, "failed": 1} == result.server
    assert result.server["reasons"] == {
        "429 Too Many Requests: Too many requests are waiting.": 1,
        "the stream broke off after 2 pieces of an answer": 1,
    }
    (remark,) = [remark for remark in report.remarks if "refused" in remark]
    assert "1 refused and 1 failed of 5 requests: 1 × 429 Too Many" in remark
    assert "3 answered, 1 refused, 1 failed; tokens of one: 30 prompt, 4 new" in request_lines([result])[0]


def test_a_case_without_an_answer_leaves_those_before_it(tmp_path: Path) -> None:
    with chat_server(*[Reply()] * 5, BUSY) as chat:  # four for the first case, one ahead of the next
        report = measured(chat.url, ONE, TWO, effort=Effort(3, 0, 0))
    assert [bool(result.samples) for result in report.results] == [True, False]
    report.save(tmp_path / "r.json")
    assert read_report(tmp_path / "r.json").results == report.results
    assert set(draw_plots(report)) == {"latency"} and knee(report.results) is None


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([failure(400, "The prompt is too long.")], "400 Bad Request: The prompt is too long."),
        ([Reply(), BUSY], "no request has an answer: 429 Too Many Requests"),
    ],
)
def test_a_server_that_answers_nothing_is_an_error_with_its_words(replies: list[Reply], said: str) -> None:
    with chat_server(*replies) as chat, pytest.raises(InputError) as caught:
        measured(chat.url, ONE)
    assert said in str(caught.value) and caught.value.hint


def test_what_makes_figures_doubtful_is_said() -> None:
    cached = usage_chunk(USAGE | {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 20}})
    with chat_server(Reply((*WORDS, chunk({}, "stop"), cached, DONE))) as chat:
        said = " ".join(measured(chat.url, ONE).remarks)
    assert "3 of 3 answers have another length" in said and "67% of the prompts in its cache" in said
    with chat_server(Reply((*WORDS, chunk({}, "stop"), DONE))) as chat:
        said = " ".join(measured(chat.url, ONE).remarks)
    assert "no usage" in said and "another length" not in said and "cache" not in said
    begins_alike = usage_chunk(USAGE | {"prompt_tokens_details": {"cached_tokens": 3}})
    with chat_server(Reply((*STREAM[:-2], begins_alike, DONE))) as chat:  # of 30: what precedes every picture
        report = measured(chat.url, ONE)
    assert report.results[0].server["cached_share"] == 0.1 and "cache" not in " ".join(report.remarks)
    busy = Tally(3, 3, client_busy=0.8)
    assert busy.remarks("a case") == ["a case: the client took 80% of a core: some of each time is its own"]


def test_the_bars_of_a_server_are_what_can_be_seen_of_it() -> None:
    with chat_server() as chat:
        report = measured(chat.url, ONE)
    (axes,) = draw_plots(report)["latency"].axes
    widths = [bar.get_width() for bars in axes.containers[:2] for bar in bars]
    spreads = report.results[0].spreads
    assert widths == [spreads["ttft"].p50, 3 * spreads["tpot"].p50]
    assert chat.url[7:-3] in axes.get_title(loc="left") and "this machine" not in axes.get_title(loc="left")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "--image-side", "16", "--decode-tokens", "4", *map(str, arguments)])


def test_the_command_measures_saves_and_compares(tmp_path: Path) -> None:
    asked = ("--runs", 2, "--warmup", 0, "--mode", "throughput", "--batch", "1,2")
    with chat_server() as chat:
        first = invoke("--url", chat.url, *asked, "--save", tmp_path / "a.json", "--html", tmp_path / "a.html")
        assert first.exit_code == 0, first.stderr
        second = invoke("--url", chat.url, "--model", "b", *asked, "--compare", tmp_path / "a.json", "--threshold", 900)
    assert second.exit_code == 0, second.stderr
    assert chat.url[7:-3] in first.stdout and "a-model" in first.stdout and "4 answered" in first.stdout
    assert "model was a-model and is b" in second.stderr
    assert {request["model"] for request in chat.requests} == {"a-model", "b"}
    assert "4 answered" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_failures_end_with_5_refusals_alone_with_0_and_a_key_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, "k-123")
    for reply, code in ((BUSY, 0), (failure(500, "k-123 is odd"), 5)):
        with chat_server(Reply(), Reply(), reply, Reply()) as chat:
            done = invoke("--url", chat.url, "--runs", 3, "--warmup", 0, "--save", tmp_path / "r.json", "--force")
        assert done.exit_code == code, done.stderr
        assert "1 × " in done.stderr and set(chat.keys) == {"Bearer k-123"}
        assert "k-123" not in done.output + (tmp_path / "r.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("models", "reply", "said", "hint"),
    [
        (model_list("a", "b"), Reply(), "a, b", "--model NAME"),
        (Reply(kind="text/html", body=b"<p>"), Reply(), "no list of an OpenAI API", "--url http://"),
        (None, failure(401, "Incorrect API key provided."), "Incorrect API key provided.", f"export {API_KEY}=…"),
        (None, BROKEN, "broke off after 2 pieces", "--url http://"),
    ],
)
def test_a_server_that_cannot_be_measured_ends_with_3(models: Reply | None, reply: Reply, said: str, hint: str) -> None:
    with chat_server(reply, models=models) as chat:
        done = invoke("--url", chat.url)
    assert done.exit_code == 3, done.stderr
    assert said in done.stderr and hint in done.stderr.splitlines()[-1]
