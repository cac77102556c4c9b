"""`pixtral serve` under load, as a process of its own: right answers, throughput, clients that leave, bounds. JSON.

    python scripts/check_server.py artifacts/demo/bundle

- load: 200 requests over pictures of mixed sizes from 32 connections, every second one streaming. Each answer is that
  of `pixtral run` on the same requests; the throughput is a share of its (rounds alternate, the median counts). CPU
  seconds stand beside it, since clients take some too; those of `pixtral run` include its start.
- leavers: 1,000 clients that go away at random moments, twice: slots and queue are then free, and the second thousand
  takes no more memory than the first.
- bounds: more requests than slots and queue hold, and a body of 200 MB, twice.

Exit 6 where something is not as promised.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from child_process import counters

PICTURES = Path(__file__).parents[1] / "tests" / "data" / "images"
QUESTIONS = ("what shape is in the image?", "what color is the shape?", "is there a circle?", "is there a red shape?")
REQUESTS, CONNECTIONS, ROUNDS, SLOTS = 200, 32, 5, 8
LEAVERS = 1000
NEW_TOKENS = 16
GOAL = 0.95  # of the throughput of `pixtral run`
HUGE_BODY_BYTES = 200_000_000
MOST_GROWTH_BYTES = 16_000_000  # of the server's memory, when something is done a second time
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True)
class Server:
    """A `pixtral serve` that runs."""

    port: int
    process: subprocess.Popen[str]

    @property
    def memory_bytes(self) -> int:
        return 1024 * counters(Path("/proc") / str(self.process.pid) / "status")["RssAnon"]

    @property
    def cpu_s(self) -> float:
        fields = (Path("/proc") / str(self.process.pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def metric(self, name: str) -> float:
        return float(re.findall(rf"^pixtral:{name} (\S+)$", self.get("/metrics"), re.MULTILINE)[0])


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """Start a server at a free port; at the end SIGTERM must make it exit 0."""
    command = [
        sys.executable,
        "-m",
        "pixtral_cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--batch",
        str(SLOTS),
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = next(line for line in process.stderr if "http://" in line)
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    server = Server(int(re.findall(r":(\d+)/v1", first)[0]), process)
    try:
        while True:
            try:
                server.get("/ready")
                break
            except OSError:
                time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(120):
            raise SystemExit(f"the server ended with {process.returncode}")


def make_requests(folder: Path) -> list[dict[str, Any]]:
    """Requests as `pixtral run --requests` reads them, each about a picture of its own."""
    draw, bases, requests = random.Random(0), sorted(PICTURES.glob("*.png")), []
    for number in range(REQUESTS):
        path = folder / f"{number}.png"
        with Image.open(draw.choice(bases)) as picture:
            size = draw.randrange(40, 200), draw.randrange(40, 200)
            picture.convert("RGB").resize(size).rotate(draw.choice((0, 90, 180))).save(path)
        asked = {"id": str(number), "prompt": draw.choice(QUESTIONS), "images": [path.name]}
        requests.append(asked | {"max_new_tokens": NEW_TOKENS})
    (folder / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests), encoding="utf-8")
    return requests


def run_job(bundle: Path, folder: Path) -> tuple[float, list[str]]:
    """Requests a second of `pixtral run`, and its answers."""
    results = folder / "results.jsonl"
    command = [sys.executable, "-m", "pixtral_cli", "run", str(bundle), "--requests", str(folder / "requests.jsonl")]
    command += ["-o", str(results), "--force", "--json", "--batch", str(SLOTS)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = {one["id"]: one["answer"] for one in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    return json.loads(printed)["requests_per_s"], [records[str(number)] for number in range(REQUESTS)]


def body_of(request: dict[str, Any], folder: Path, **options: Any) -> bytes:
    picture = base64.b64encode((folder / request["images"][0]).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": request["prompt"]},
    ]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": NEW_TOKENS} | options).encode()


class Client(threading.local):
    """A connection of each thread."""

    connection: http.client.HTTPConnection | None = None

    def ask(self, port: int, body: bytes) -> tuple[int, str, float | None]:
        """Status, answer, and for a stream the seconds to its first token."""
        if self.connection is None or self.connection.port != port:
            self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        started = time.perf_counter()
        self.connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        if response.headers.get_content_type() != "text/event-stream":
            value = json.loads(response.read())
            return response.status, value["choices"][0]["message"]["content"] if "choices" in value else "", None
        text, first = "", None
        for line in response:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                said = choice["delta"].get("content", "")
                first = time.perf_counter() - started if said and first is None else first
                text += said
        return response.status, text, first


CLIENT = Client()


def serve_all(server: Server, bodies: Sequence[bytes]) -> tuple[float, list[str], list[float], Counter[int]]:
    """Requests a second, answers, times to the first token in seconds, and how many had which status."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        replies = list(pool.map(lambda body: CLIENT.ask(server.port, body), bodies))
    seconds = time.perf_counter() - started
    firsts = [first for *_, first in replies if first is not None]
    return len(bodies) / seconds, [text for _, text, _ in replies], firsts, Counter(status for status, *_ in replies)


def leave(server: Server, body: bytes, seed: int) -> None:
    """Ask, and go away at a random moment: before the request is whole, while it waits, or in the answer."""
    draw = random.Random(seed)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        connection.sendall(data[: draw.randrange(len(data))] if seed % 10 == 0 else data)
        time.sleep(draw.uniform(0, 0.2))
        if seed % 3 == 0:  # at once, without a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def settle(server: Server) -> bool:
    """Whether nothing runs or waits, within a minute."""
    for _ in range(600):
        if server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0:
            return '"ok"' in server.get("/ready")
        time.sleep(0.1)
    return False


def send_huge_body(server: Server) -> int:
    """The status that a body of 200 MB gets, sent in pieces and without its length."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(HUGE_BODY_BYTES // 0x100000):
                connection.sendall(piece)
        except OSError:
            pass  # it was told, and hung up
        return int(connection.recv(1000).split(b" ")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = make_requests(folder)
        bodies = [body_of(one, folder, stream=number % 2 == 1) for number, one in enumerate(requests)]
        figures: dict[str, Any] = {"cpus": os.cpu_count(), "requests": REQUESTS, "connections": CONNECTIONS}
        with serving(bundle) as server:
            serve_all(server, bodies[:40])  # warm
            ratios, firsts = [], []
            for _ in range(ROUNDS):
                times = os.times()
                run_rate, expected = run_job(bundle, folder)
                run_cpu_s = sum(os.times()[2:4]) - sum(times[2:4])
                before_s = server.cpu_s
                rate, answers, waited, statuses = serve_all(server, bodies)
                serve_cpu_s = server.cpu_s - before_s
                ratios.append(rate / run_rate)
                firsts += waited
                wrong = sum(ours != theirs for ours, theirs in zip(answers, expected, strict=True))
                seen = {"run_per_s": run_rate, "serve_per_s": round(rate, 2), "wrong": wrong}
                seen |= {"run_cpu_s": round(run_cpu_s, 1), "serve_cpu_s": round(serve_cpu_s, 1)}
                print(json.dumps(seen), flush=True)
                figures["wrong"] = figures.get("wrong", 0) + wrong + REQUESTS - statuses[200]
            figures["throughput_ratio"] = round(statistics.median(ratios), 3)
            figures["ttft_s"] = {
                "p50": round(statistics.median(firsts), 3), "p99": round(statistics.quantiles(firsts, n=100)[98], 3),
            }  # fmt: skip
            long = [body_of(one, folder, stream=True, max_tokens=400, logit_bias={"77": 100}) for one in requests]
            memory = figures["memory_bytes"] = {"after_load": server.memory_bytes}
            for turn in ("first", "second"):
                with ThreadPoolExecutor(CONNECTIONS) as pool:
                    list(pool.map(lambda seed: leave(server, long[seed % REQUESTS], seed), range(LEAVERS)))
                figures["settled"] = settle(server)
                memory[f"after_{turn}_leavers"] = server.memory_bytes
            _, answers, _, _ = serve_all(server, bodies)
            figures["wrong_after_leavers"] = sum(a != b for a, b in zip(answers, expected, strict=True))
            for turn in ("first", "second"):
                figures["huge_body_status"] = send_huge_body(server)
                memory[f"after_{turn}_huge_body"] = server.memory_bytes
        with serving(bundle, "--queue", "4") as server:
            *_, statuses = serve_all(server, bodies)
            figures["queue_of_4"] = {str(status): count for status, count in sorted(statuses.items())}
    print(json.dumps(figures))
    is_right = not figures["wrong"] and not figures["wrong_after_leavers"] and figures["settled"]
    is_bounded = figures["huge_body_status"] == 413 and set(statuses) == {200, 429}
    is_flat = all(
        memory[f"after_second_{kind}"] - memory[f"after_first_{kind}"] < MOST_GROWTH_BYTES
        for kind in ("leavers", "huge_body")
    )
    sys.exit(0 if is_right and is_bounded and is_flat and figures["throughput_ratio"] >= GOAL else 6)


if __name__ == "__main__":
    main()
