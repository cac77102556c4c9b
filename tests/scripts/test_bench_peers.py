"""The comparison with other runtimes: its arithmetic, and two of the runtimes for real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import peers
from bench_peers import (
    DIFFERS,
    GENAI,
    LLAMA,
    OPENVINO,
    OURS,
    TRANSFORMERS,
    VLLM,
    Child,
    ChildFailed,
    Runtime,
    goals,
    markdown,
    summarize,
    take_part,
    take_turns,
)  # fmt: skip
from helpers.bundles import exported
from helpers.places import DEMO, ROOT
from helpers.tiny import VOCABULARY, tiny_config, write_checkpoint
from peers import Work
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.parameters import parameters
from pixtral_export.plan import ExportSettings


def figures(decode: float, prefill: float, peak: int = 2_000_000_000) -> dict[str, Any]:
    """What a child says of a round."""
    speeds = {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill}
    return speeds | {"peak_rss_bytes": peak, "anonymous_bytes": 1, "threads": 2, "versions": {}}


ROUNDS = {
    OURS: [figures(10, 100), figures(30, 90, 3_000_000_000), figures(20, 80)],
    LLAMA: [figures(5, 100), figures(20, 100), figures(20, 100)],
}


def test_ratios_are_taken_round_by_round_with_quartiles() -> None:
    over = summarize(ROUNDS)[LLAMA]["pixtral_over_it"]
    assert over["decode"] == {"median": 1.5, "low": 1.25, "high": 1.75}  # of the medians it would be 1.0
    assert over["prefill"] == {"median": 0.9, "low": 0.85, "high": 0.95}


def test_the_table_has_spreads_ratios_memory_and_what_differs() -> None:
    table = markdown(summarize(ROUNDS), {})
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert lines[OURS] == "| pixtral | 20.00 (15.00 to 25.00) | 90.0 (85.0 to 95.0) |  |  | 3.00 GB |"
    assert lines[LLAMA].endswith("| 1.50 (1.25 to 1.75) | 0.90 (0.85 to 0.95) | 2.00 GB |")
    assert DIFFERS[LLAMA] in table


def test_goals_of_a_runtime_that_was_not_measured_are_open() -> None:
    holds = {goal["goal"]: goal["holds"] for goal in goals(summarize(ROUNDS), 0.76)}
    assert holds == {
        "decode over llama.cpp": True,
        "prefill over llama.cpp": False,
        "decode over transformers": None,
        "decode over bandwidth": True,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())


@pytest.fixture(scope="module")
def text(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "text"
    peers.write_text_checkpoint(str(checkpoint), str(folder))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("bundle") / "b", ExportSettings(precision="int4", method="rtn")).path


def test_peers_without_an_interpreter_and_those_that_fail_are_listed_with_the_reason(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").symlink_to(text)  # as another run may leave it
    interpreters = {LLAMA: None, GENAI: sys.executable, OPENVINO: str(tmp_path / "no-python")}
    runtimes, missing = take_part(interpreters, tmp_path / "bundle", checkpoint, tmp_path)
    assert set(runtimes) == {OURS} and set(missing) == {*interpreters, VLLM}
    assert missing[LLAMA] == "no --llama-python was given"
    assert "onnxruntime_genai" in missing[GENAI] and "no-python" in missing[OPENVINO]
    for name, reason in missing.items():
        assert f"- {name}: not measured: {reason}" in markdown({}, missing)


def test_a_peer_that_fails_while_it_runs_is_listed_and_the_others_go_on(bundle: Path) -> None:
    runtimes = {OURS: Runtime(sys.executable, bundle), GENAI: Runtime(sys.executable, bundle)}
    missing: dict[str, str] = {}
    work = Work("", VOCABULARY, prompt_tokens=4, steps=1, threads=1)
    rounds, bandwidths = take_turns(runtimes, work, 1, missing)
    assert list(rounds) == [OURS] and list(missing) == [GENAI] and len(bandwidths) == 1


class Server(BaseHTTPRequestHandler):
    """vLLM's addresses, as far as a round needs them. `tokens` None: as many as are asked for."""

    tokens: int | None = None
    asked: list[dict[str, Any]] = []  # noqa: RUF012 - of this test alone

    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": "text"}]} if self.path == "/v1/models" else {"version": "1.2"}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        made = [{"choices": [{"text": "a"}]}] * (request["max_tokens"] if self.tokens is None else self.tokens)
        self._say("".join(f"data: {json.dumps(one)}\n\n" for one in [*made, {"choices": []}]) + "data: [DONE]\n\n")

    def _say(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_vllm_is_measured_through_its_server_whose_memory_is_its_own() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    work, missing = Work("", 100, prompt_tokens=4, steps=3, threads=1), dict[str, str]()
    rounds, _ = take_turns({VLLM: Runtime(sys.executable, address)}, work, 2, missing)
    assert not missing and rounds[VLLM][0]["versions"] == {"vllm": "1.2"}
    assert rounds[VLLM][0]["decode_tokens_per_s"] > 0 and rounds[VLLM][0]["peak_rss_bytes"] is None
    assert len(Server.asked) == 3  # one that does not count, and two rounds
    assert Server.asked[0]["prompt"] == work.prompt.tolist() and Server.asked[0]["max_tokens"] == 4
    assert "the server's |" in markdown(summarize({OURS: [figures(1, 1)] * 2, VLLM: rounds[VLLM]}), {})
    Server.tokens = 2
    _, _ = take_turns({VLLM: Runtime(sys.executable, address)}, work, 1, missing)
    assert missing == {VLLM: "the server ended its answer early"}
    server.shutdown()


def test_the_reason_of_a_failure_is_what_the_child_said_last() -> None:
    child = Child(sys.executable, "prepare", {"name": "nothing", "source": "", "target": ""})
    with pytest.raises(ChildFailed, match="KeyError: 'nothing'"):
        child.finish()
    child.stop()


def test_pixtral_itself_may_not_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="is no bundle"):
        take_turns({OURS: Runtime(sys.executable, tmp_path / "none")}, Work("", 100, 4, 1, 1), 1, {})


def test_transformers_gets_the_decoder_of_the_checkpoint(checkpoint: Path, text: Path) -> None:
    from transformers import MistralForCausalLM

    opened = open_checkpoint(checkpoint)
    model = MistralForCausalLM.from_pretrained(text, dtype=torch.bfloat16)
    assert model.config.to_dict()["rope_parameters"]["rope_theta"] == opened.config.decoder.rope_theta
    assert model.config.num_hidden_layers == 2 and model.config.sliding_window is None
    weights = model.state_dict()
    by_name = {parameter.name: parameter for parameter in parameters(opened.config)}
    for name, key in {
        "layers.1.attention.wq.weight": "model.layers.1.self_attn.q_proj.weight",
        "layers.0.feed_forward.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }.items():
        assert torch.equal(weights[key], opened.read(by_name[name]).to(torch.bfloat16)), name


def test_pixtral_and_transformers_run_for_real_beside_peers_that_are_missing(bundle: Path, tmp_path: Path) -> None:
    script = [sys.executable, "scripts/bench_peers.py", "--checkpoint", str(DEMO), "--bundle", str(bundle)]
    script += ["--workdir", str(tmp_path / "work")]
    script += ["--prompt-tokens", "8", "--steps", "2", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["runtimes"]) == {OURS, TRANSFORMERS} and set(result["missing"]) == {LLAMA, GENAI, OPENVINO, VLLM}
    assert result["precision"] == "int4"
    for seen in result["runtimes"].values():
        assert 0 < seen["decode_tokens_per_s"]["low"] <= seen["decode_tokens_per_s"]["high"]
        assert seen["peak_rss_bytes"] >= seen["anonymous_bytes"] > 0
    assert done.stdout.startswith("| runtime |") and "- llama.cpp: not measured" in done.stdout
