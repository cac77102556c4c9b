"""`pixtral serve` as a process: how it is set up, what it logs, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.places import ROOT
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.main import app

CHAT = "/v1/chat/completions"
KEY = "a-key-of-mine"
ASKED = {"messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 20}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    export_tiny(write_checkpoint(folder / "checkpoint", tiny_config()), folder / "bundle")
    return folder / "bundle"


class Child:
    """`pixtral serve` in a process, set up by the environment alone."""

    def __init__(self, bundle: Path, **options: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {f"PIXTRAL_{name.upper()}": value for name, value in {"port": "0", **options}.items()}
        command = [sys.executable, "-m", "pixtral_cli", "serve", str(bundle)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        self.lines: list[str] = []
        first: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, args=(first,), daemon=True)
        self._reader.start()
        self.url = re.findall(r"http://[^ ]+?:\d+", first.get(timeout=120))[0]
        while True:
            try:
                assert httpx2.get(f"{self.url}/ready").is_success
                return
            except httpx2.TransportError:
                threading.Event().wait(0.02)

    def _read(self, first: Queue[str]) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "http://" in line:
                first.put(line)

    def post(self, body: Any) -> httpx2.Response:
        return httpx2.post(self.url + CHAT, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(60)
        return code


@pytest.fixture
def child(bundle: Path) -> Iterator[Child]:
    running = Child(bundle, api_key=KEY, served_model_name="mine")
    yield running
    running.process.kill()


def test_it_is_set_up_by_the_environment_and_ends_when_what_runs_is_done(child: Child) -> None:
    (listed,) = httpx2.get(f"{child.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}).json()["data"]
    assert listed["id"] == "mine"
    assert httpx2.get(f"{child.url}/v1/models").status_code == 401
    endless = ASKED | {"stream": True, "max_tokens": 200, "logit_bias": {"77": 100}}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.stream("POST", child.url + CHAT, json=endless, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        child.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2] == "data: [DONE]"
    assert child.process.wait(60) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{child.url}/health")
    child.end()
    said = [json.loads(line) for line in child.lines if line.startswith("{")]
    paths = [line["path"] for line in said if line["logger"] == "pixtral.requests"]
    assert paths == ["/v1/models", "/v1/models", CHAT]
    assert (said[-1]["status"], said[-1]["finish_reasons"]) == (200, ["length"])
    assert not any("secret" in line or KEY in line for line in child.lines)


def test_asked_twice_it_ends_at_once_and_without_a_trace(child: Child) -> None:
    endless = ASKED | {"stream": True, "max_tokens": 400, "logit_bias": {"77": 100}}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.stream("POST", child.url + CHAT, json=endless, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        child.process.send_signal(signal.SIGTERM)
        while True:  # it hears of the first one before it takes the second
            try:
                httpx2.get(f"{child.url}/health")
            except httpx2.TransportError:
                break
        child.end()
    assert not any("Traceback" in line for line in child.lines)


def invoke(bundle: Path, *options: object) -> Any:
    return CliRunner().invoke(app, ["serve", str(bundle), *map(str, options)])


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = invoke(bundle, "--port", port)
    assert done.exit_code == 4
    assert f"port {port}" in done.stderr and f"--port {port + 1}" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--api-key-file", "missing.txt"), "missing.txt"),
        (("--api-key-file", "empty.txt"), "holds no key"),
        (("--api-key-file", "odd.txt"), "a key holds characters"),
        (("--allowed-local-media-path", "empty.txt"), "is no folder"),
        (("--max-body", "many"), "--max-body"),
        (("--image-tokens", "1"), "--image-tokens"),
        (("--batch", "0"), "--batch"),
        (("--memory-limit", "1kB"), "--max-context N"),
        (("--host", "256.1.1.1"), "256.1.1.1"),
        (("--host", "a" * 70), "is no host's name"),
        (("--backend", "ort-cpu", "--device", "0"), "--device"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_the_start(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("odd.txt").write_text("two words\n", encoding="utf-8")
    done = invoke(bundle, "--port", 0, *options)
    assert done.exit_code in (3, 4)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
