"""Many clients at a time: bounded, fair, and none harms another."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest

from helpers.places import ROOT
from helpers.serving import NAME, Served, served
from pixtral_runtime import Model
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.server.model_loop import MOST_FAILURES
from pixtral_runtime.server.service import Limits

PICTURES = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))
CHAT = "/v1/chat/completions"
FIXED: dict[str, Any] = {"logit_bias": {"77": 100}}
ENDLESS: dict[str, Any] = FIXED | {"max_tokens": 500}  # of the context's 600


def body(text: str = "is there a circle?", **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | options


class Brake:
    """Lets a scheduler make a step only when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits, step = threading.Semaphore(0), Scheduler.step

        def braked(scheduler: Scheduler) -> list[Generation]:
            self._permits.acquire()
            return step(scheduler)

        monkeypatch.setattr(Scheduler, "step", braked)

    def let(self, steps: int) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        self.let(100_000)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    brake = Brake(monkeypatch)
    yield brake
    brake.release()


def stream(server: Served, stack: ExitStack, **options: Any) -> Iterator[str]:
    """The lines of a stream that has begun; who lets go of them leaves."""
    response = stack.enter_context(
        httpx2.stream("POST", server.url + CHAT, json=body(stream=True, **options), timeout=60)
    )
    assert response.is_success
    lines = response.iter_lines()
    next(lines)
    return lines


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_answers_do_not_depend_on_who_asks_beside(model: Model) -> None:
    questions = [f"{word} is there a circle?" for word in ("well,", "so,", "now", "please:", "say")]
    expected = [model.generate(text, [path], max_new_tokens=6).text for text in questions for path in PICTURES[:4]]
    with served(model, slots=3) as server, ThreadPoolExecutor(8) as pool:

        def ask(text: str, number: int) -> str:
            data = PICTURES[number].read_bytes()
            url = f"data:image/png;base64,{b64encode(data).decode()}"
            content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
            found: Any = server.client().chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": content}], max_tokens=6, stream=number % 2 == 1
            )
            if number % 2 == 0:
                return str(found.choices[0].message.content)
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)

        running = [pool.submit(ask, text, number) for text in questions for number in range(4)]
        assert [one.result() for one in running] == expected
        wait_until(lambda: server.service.places.taken == 0)  # a stream is over for its client a moment before
        assert server.metric("num_requests_running") == 0


def test_beyond_the_queue_a_client_is_told_when_to_come_again(model: Model, brake: Brake) -> None:
    with served(model, slots=1, limits=Limits(queue=0)) as server, ExitStack() as stack:
        lines = stream(server, stack, **ENDLESS)
        assert next(lines) == ""
        assert server.get("/ready").status_code == 503
        assert server.get("/health").is_success
        refused = server.post(CHAT, body())
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}])
        stack.close()
        brake.release()
        wait_until(lambda: server.service.places.taken == 0)
        assert server.get("/ready").is_success
        assert server.post(CHAT, body()).is_success
        assert server.post(CHAT, body(n=2)).status_code == 429  # two answers, one place
        assert server.service.places.taken == 0


def test_who_leaves_gives_the_slot_back_within_a_step(model: Model, brake: Brake) -> None:
    with served(model, slots=1) as server, ExitStack() as stack:
        lines = stream(server, stack, **ENDLESS)
        brake.let(4)
        assert next(lines) == ""
        with pytest.raises(httpx2.ReadTimeout):  # who does not stream leaves as well, while it waits in the queue
            httpx2.post(server.url + CHAT, json=body(**ENDLESS), timeout=0.5)
        stack.close()
        wait_until(lambda: server.service.places.taken == 0)
        brake.let(1)
        wait_until(lambda: not server.service.loop.scheduler.busy)
        assert server.metric("generation_tokens_total") <= 5
        assert 'request_success_total{finished_reason="abort"} 2.0' in server.get("/metrics").text
        brake.release()
        assert server.post(CHAT, body()).is_success


def test_first_come_first_served(model: Model, brake: Brake) -> None:
    order: list[int] = []
    with served(model, slots=1) as server, ThreadPoolExecutor(6) as pool:

        def ask(number: int) -> None:
            assert server.post(CHAT, body(f"{number}", max_tokens=40, **FIXED)).is_success
            order.append(number)

        waiting = [pool.submit(ask, -1)]
        wait_until(lambda: server.service.loop.scheduler.busy)
        for number in range(5):
            waiting.append(pool.submit(ask, number))
            wait_until(lambda number=number: server.service.loop.waiting == number + 2)  # type: ignore[misc]
        brake.release()
        for one in waiting:
            one.result()
        assert order == [-1, 0, 1, 2, 3, 4]


def test_a_request_has_an_end_in_time(model: Model, brake: Brake) -> None:
    with served(model, limits=Limits(request_s=0.3)) as server:
        assert server.post(CHAT, body()).status_code == 504
        text = server.post(CHAT, body(stream=True)).text
        *_, last, done, _ = text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert done == "data: [DONE]"
        assert server.service.places.taken == 0
        brake.release()
        wait_until(lambda: not server.service.loop.scheduler.busy)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next steps of any scheduler fail."""
    step, left = Scheduler.step, iter(range(times))

    def fail(self: Scheduler) -> Any:
        if next(left, None) is not None:
            raise RuntimeError("an illegal memory access")
        return step(self)

    monkeypatch.setattr(Scheduler, "step", fail)


def test_a_step_that_fails_costs_the_answers_under_way_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model) as server:
        expected = server.post(CHAT, body()).json()["choices"]
        failing(monkeypatch, 1)
        lost = server.post(CHAT, body())
        assert lost.status_code == 500
        assert "illegal memory" not in lost.text
        assert server.post(CHAT, body()).json()["choices"] == expected
        assert server.get("/health").is_success


def test_a_model_that_fails_again_and_again_is_no_longer_alive(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model) as server:
        failing(monkeypatch, MOST_FAILURES)
        for _ in range(MOST_FAILURES):
            assert server.post(CHAT, body()).status_code == 500
        assert server.get("/health").status_code == 503
        assert server.get("/ready").status_code == 503
        assert server.post(CHAT, body()).status_code == 503
