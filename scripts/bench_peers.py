"""Our speed beside other runtimes: the same shapes, prompt and token counts, on the same machine, in one run.

    python -m venv llama && CMAKE_ARGS="-DGGML_NATIVE=ON" llama/bin/pip install llama-cpp-python gguf
    python -m venv genai && genai/bin/pip install onnxruntime-genai "torch==2.13.0+cpu" transformers onnx-ir
    python -m venv openvino && openvino/bin/pip install "optimum-intel[openvino]" "torch==2.13.0+cpu"
    python scripts/bench_peers.py --layers 4 --llama-python llama/bin/python --genai-python genai/bin/python \\
        --openvino-python openvino/bin/python

On a GPU machine: vllm serve WORKDIR/text --max-model-len 4096 --no-enable-prefix-caching, then --vllm-url (written to
its documentation, not yet run on a device).

Peers live in environments of their own: none may change what pixtral runs with. A peer without an interpreter, or one
that fails, is listed with the reason. transformers is the one of this interpreter. Without --checkpoint and --bundle, a
random checkpoint of Pixtral-12B's widths is written and exported, int4 by rounding. All peers but llama.cpp, which gets
random weights, convert that checkpoint's decoder. `--workdir` keeps what was converted for another run.

Runtimes are child processes that load their model first and then take turns of seconds, so that a busy minute of the
machine hits all; who goes first changes from round to round. A round is a prefill of random text tokens with logits for
the last one, and greedy decode steps; its decode speed is that of the median step. `pixtral ÷` is ours over the
runtime's, round by round. Figures are medians over the rounds with quartiles. Memory is the peak of the resident set,
mapped files included, so all that take part must fit beside each other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peers
from make_synthetic_checkpoint import pixtral_12b, write_checkpoint
from peers import Work
from pixtral_runtime.bench.cpu_rates import measure_bandwidth
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.onnx_weights import graph_weight_bytes

OURS, LLAMA, TRANSFORMERS = "pixtral", "llama.cpp", "transformers"
GENAI, OPENVINO, VLLM = "onnxruntime-genai", "openvino", "vllm"
OPTIONS = {LLAMA: "--llama-python", GENAI: "--genai-python", OPENVINO: "--openvino-python"}
DIFFERS = {
    OURS: "int4 in groups of 128 with a float scale, embedding and head int8; cache in the bundle's dtype; the prompt "
    "in chunks of 256; ONNX Runtime quantizes activations to int8",
    LLAMA: "Q4_0: groups of 32 with a float16 scale, so 4.5 bits a weight to our 4.25; embedding and head Q8_0; "
    "float16 cache; other random weights; weights repacked for the CPU while loading",
    TRANSFORMERS: "bfloat16 weights, activations and cache, nothing quantized: four times the bytes a token; the cache "
    "is concatenated for every token",
    GENAI: "int4 in groups of 128 by its own builder, head int8, embedding float32; it picks tokens itself, inside its "
    "times; the builder's graph and kernels of the same ONNX Runtime as ours",
    OPENVINO: "int4 in groups of 128 by NNCF, embedding and head int8; activations quantized in groups and the cache "
    "int8, as its CPU plugin does by default",
    VLLM: "bfloat16 unless its server was told otherwise; HTTP and picking tokens are inside its times",
}
GOALS = (  # what, of which runtime, at least
    ("decode", LLAMA, 1.0),
    ("prefill", LLAMA, 1.0),
    ("decode", TRANSFORMERS, 5.0),
)
BANDWIDTH_GOAL = 0.75
REASON_CHARACTERS = 300

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""What each runtime measured, round by round."""


@dataclass(frozen=True)
class Runtime:
    """A runtime that takes part."""

    interpreter: str
    model: Path | str  # a path, or a server's address


class ChildFailed(Exception):
    """A child process did not end well. The text is the last that it said."""


class Child:
    """A process of `peers.py` in a runtime's interpreter. What it writes to stderr is kept for the day it fails."""

    def __init__(self, interpreter: str, task: str, settings: Mapping[str, Any]) -> None:
        """Raises ChildFailed where there is no such interpreter."""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [interpreter, peers.__file__, "--child", task, json.dumps(settings)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        except OSError as error:
            raise ChildFailed(str(error)) from error

    def answer(self) -> dict[str, Any]:
        """The next object that it prints. Raises ChildFailed where it ends instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print as well
                result: dict[str, Any] = json.loads(line)
                return result
        raise ChildFailed(self._last_words())

    def measure(self) -> dict[str, Any]:
        """A round. Raises ChildFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        except OSError:
            raise ChildFailed(self._last_words()) from None
        return self.answer()

    def finish(self) -> None:
        """Wait for a child that measures nothing. Raises ChildFailed."""
        self._process.communicate()
        if self._process.returncode:
            raise ChildFailed(self._last_words())

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        return (said[-1] if said else f"exit code {self._process.returncode}")[:REASON_CHARACTERS]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds."""
    low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def cpu_name() -> str:
    """The processor as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ratios(rounds: Rounds, name: str, stage: str) -> dict[str, float]:
    """Our speed over a runtime's, round by round: above 1 we are faster."""
    key = f"{stage}_tokens_per_s"
    return spread([ours[key] / theirs[key] for ours, theirs in zip(rounds[OURS], rounds[name], strict=True)])


def summarize(rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Each runtime's speeds and memory with their spread, ours over it, its versions, and what differs."""
    return {
        name: {
            "decode_tokens_per_s": spread([seen["decode_tokens_per_s"] for seen in each]),
            "prefill_tokens_per_s": spread([seen["prefill_tokens_per_s"] for seen in each]),
            "pixtral_over_it": {stage: ratios(rounds, name, stage) for stage in ("decode", "prefill")},
            "peak_rss_bytes": max((seen["peak_rss_bytes"] for seen in each if seen["peak_rss_bytes"]), default=None),
            "anonymous_bytes": max((seen["anonymous_bytes"] for seen in each if seen["anonymous_bytes"]), default=None),
            "threads": each[0]["threads"],
            "versions": each[0]["versions"],
            "differs": DIFFERS[name],
        }
        for name, each in rounds.items()
    }


def goals(runtimes: Mapping[str, Any], share_of_bandwidth: float) -> list[dict[str, Any]]:
    """Each goal with the median seen and whether it holds; None where the runtime was not measured."""
    result = []
    for stage, name, least in GOALS:
        seen = runtimes[name]["pixtral_over_it"][stage]["median"] if name in runtimes else None
        holds = None if seen is None else seen >= least
        result.append({"goal": f"{stage} over {name}", "least": least, "seen": seen, "holds": holds})
    share = round(share_of_bandwidth, 3)
    holds = share_of_bandwidth >= BANDWIDTH_GOAL
    result.append({"goal": "decode over bandwidth", "least": BANDWIDTH_GOAL, "seen": share, "holds": holds})
    return result


def markdown(runtimes: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    """The ratio table, what differs, and who is missing and why."""

    def cell(seen: Mapping[str, float], digits: int) -> str:
        return f"{seen['median']:.{digits}f} ({seen['low']:.{digits}f} to {seen['high']:.{digits}f})"

    lines = [
        "| runtime | decode, tokens/s | prefill, tokens/s | pixtral ÷, decode | pixtral ÷, prefill | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, seen in runtimes.items():
        over = seen["pixtral_over_it"]
        compared = ["", ""] if name == OURS else [cell(over["decode"], 2), cell(over["prefill"], 2)]
        speeds = [cell(seen["decode_tokens_per_s"], 2), cell(seen["prefill_tokens_per_s"], 1)]
        memory = f"{seen['peak_rss_bytes'] / 1e9:.2f} GB" if seen["peak_rss_bytes"] else "the server's"
        lines.append("| " + " | ".join([name, *speeds, *compared, memory]) + " |")
    lines += ["", *(f"- {name}: {seen['differs']}." for name, seen in runtimes.items())]
    lines += [f"- {name}: not measured: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def once(path: Path, interpreter: str, name: str, source: Path) -> Path:
    """Convert a model unless it is there from another run. Raises ChildFailed."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        child = Child(interpreter, "prepare", {"name": name, "source": str(source), "target": str(part)})
        try:
            child.finish()
        finally:
            child.stop()
        part.rename(path)
    return path


def take_part(
    interpreters: Mapping[str, str | None], bundle: Path, checkpoint: Path, folder: Path, server: str | None = None
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Who can be measured, with models converted in `folder`, and who cannot, with the reason."""
    runtimes, missing = {OURS: Runtime(sys.executable, bundle)}, {}
    text = once(folder / "text", sys.executable, "text", checkpoint)
    for name, interpreter in interpreters.items():
        if interpreter is None:
            missing[name] = f"no {OPTIONS[name]} was given"
            continue
        try:
            model = text if name == TRANSFORMERS else once(folder / name, interpreter, name, text)
            runtimes[name] = Runtime(interpreter, model)
        except ChildFailed as failure:
            missing[name] = str(failure)
    if server is None:
        missing[VLLM] = f"no --vllm-url was given; it would serve {text}"
    else:
        runtimes[VLLM] = Runtime(sys.executable, server)
    return runtimes, missing


def take_turns(
    runtimes: Mapping[str, Runtime], work: Work, rounds: int, missing: dict[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Rounds of all runtimes, and the bandwidth before each in bytes a second. Who fails moves to `missing`.

    Raises ChildFailed where pixtral itself fails.
    """
    seen: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, Any]] = {}
    bandwidths = []
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, runtime in runtimes.items():
            try:
                child = Child(runtime.interpreter, name, asdict(replace(work, model=str(runtime.model))))
                stack.callback(child.stop)
                about[name], children[name], seen[name] = child.answer(), child, []
            except ChildFailed as failure:
                _drop(name, failure, missing)
        for number in range(rounds):
            bandwidths.append(measure_bandwidth(work.threads).max)
            order = [name for name in children if name not in missing]
            first = number % max(1, len(order))
            for name in order[first:] + order[:first]:
                try:
                    figures = children[name].measure() | about[name]
                except ChildFailed as failure:
                    _drop(name, failure, missing)
                    continue
                seen[name].append(figures)
                speeds = f"{figures['decode_tokens_per_s']:.2f}, prefill {figures['prefill_tokens_per_s']:.1f} tokens/s"
                print(f"round {number + 1}, {name}: decode {speeds}", file=sys.stderr)
    return {name: each for name, each in seen.items() if name not in missing}, bandwidths


def _drop(name: str, failure: ChildFailed, missing: dict[str, str]) -> None:
    if name == OURS:
        raise failure
    missing[name] = str(failure)


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let all runtimes run, and put their figures side by side."""
    checkpoint, bundle = models(args, folder)
    named = {LLAMA: args.llama_python, GENAI: args.genai_python, OPENVINO: args.openvino_python}
    interpreters = {TRANSFORMERS: sys.executable} | named
    runtimes, missing = take_part(interpreters, bundle.path, checkpoint, folder, args.vllm_url)
    decoder = bundle.model.decoder
    work = Work("", decoder.vocab_size, args.prompt_tokens, args.steps, args.threads)
    rounds, bandwidths = take_turns(runtimes, work, args.rounds, missing)
    seen = summarize(rounds)
    bytes_per_s = graph_weight_bytes(bundle, "decoder") * seen[OURS]["decode_tokens_per_s"]["median"]
    return {
        "layers": decoder.n_layers,
        "prompt_tokens": args.prompt_tokens,
        "decode_steps": args.steps,
        "rounds": args.rounds,
        "threads": args.threads,
        "cpu": cpu_name(),
        "precision": bundle.precision,
        "read_bandwidth_gb_per_s": spread([bandwidth / 1e9 for bandwidth in bandwidths]),
        "runtimes": seen,
        "missing": missing,
        "goals": goals(seen, bytes_per_s / statistics.median(bandwidths)),
    }


def models(args: argparse.Namespace, folder: Path) -> tuple[Path, Bundle]:
    """The checkpoint and our bundle of it, made where none was named."""
    checkpoint, bundle = args.checkpoint, args.bundle
    if checkpoint is None:
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, pixtral_12b(args.layers, vision_layers=1))
    if bundle is None:
        bundle = folder / "bundle"
        if not bundle.exists():
            export = ["export", str(checkpoint), "-o", str(bundle), "--precision", "int4", "--method", "rtn"]
            subprocess.run([sys.executable, "-m", "pixtral_cli", *export], check=True, stdout=sys.stderr)
    return checkpoint, open_bundle(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the checkpoint it writes")
    parser.add_argument("--checkpoint", type=Path, help="measure this one instead, with --bundle made of it")
    parser.add_argument("--bundle", type=Path, help="int4 bundle of --checkpoint; default: export it")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workdir", type=Path, help="keep converted models here; default: a folder that goes")
    for name, option in OPTIONS.items():
        parser.add_argument(option, help=f"interpreter that has {name}")
    parser.add_argument("--vllm-url", help="vLLM's server, as http://localhost:8000/v1, for WORKDIR/text")
    args = parser.parse_args()
    if args.bundle and not args.checkpoint:
        parser.error("--bundle needs the --checkpoint it was made of: the other runtimes convert that")
    if args.workdir:
        args.workdir.mkdir(parents=True, exist_ok=True)
        result = compare(args, args.workdir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(args, Path(folder))
    print(markdown(result["runtimes"], result["missing"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
