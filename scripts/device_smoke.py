"""Stages of the device check on the demo's bundles: CUDA against the CPU provider, CUDA graphs, answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from device_decoder import Call, Decoder, Stream, graph_inputs, open_cpu, open_cuda, placement, relative
from device_lowering import by_length
from device_results import WORK, emit, native_log, reported

DEMO = WORK / "demo"
BUNDLES = ("float16", "int4-128", "int4-32")
CASES = {  # slots, tokens, rows, start
    "prefill": (1, 48, 64, 0),
    "later chunk": (1, 16, 64, 40),
    "decode": (1, 1, 128, 100),
    "2 slots": (2, 1, 128, 100),
}


def lowered(bundle: Path) -> Path:
    """The bundle's decoder by key length, beside it."""
    target = bundle / "decoder-by-length.onnx"
    if not target.is_file():
        onnx.save(by_length(onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)), str(target))
    return target


def feeds_of(bundle: Path, graph: str, case: tuple[int, int, int, int], random: np.random.Generator) -> dict[str, Any]:
    slots, tokens, rows, start = case
    side = 4 * json.loads((bundle / "bundle.json").read_text())["model"]["vision"]["patch_size"]
    sizes = {"B": slots, "T": tokens, "C": rows, "R": slots, "F": 4, "H": side, "W": side}
    feeds = graph_inputs(bundle / f"{graph}.onnx", sizes, random)
    if graph == "decoder":
        feeds["position_ids"] = np.tile(start + np.arange(tokens, dtype=np.int64), (slots, 1))
        feeds["write_index"] = np.full(slots, start, np.int64)
        feeds["logits_index"] = np.arange(1, slots + 1, dtype=np.int64) * tokens - 1
    if graph == "embed":
        feeds["token_ids"] = random.integers(0, 256, (slots, tokens))
        feeds["feature_index"] = np.where(np.arange(tokens) < 3, np.arange(tokens), -1)[None].repeat(slots, 0)
    return feeds


def compare(bundle: Path, graph: str, path: Path, cases: dict[str, tuple[int, int, int, int]]) -> None:
    """All outputs of a graph on CUDA against the CPU provider: the largest difference by the largest value."""
    lines: list[str] = []
    with native_log(lines):
        open_cuda(path, {"device_id": "0"}, verbose=True)
    emit(f"{bundle.name} {path.stem} nodes", str(placement(lines)))
    on_cuda, errors_seen = open_cuda(path, {"device_id": "0"}), []
    on_cpu, random = open_cpu(bundle / f"{graph}.onnx"), np.random.default_rng(0)
    names = [output.name for output in on_cpu.get_outputs()]
    for name, case in cases.items():
        with reported(f"{bundle.name} {path.stem} {name}"):
            feeds = feeds_of(bundle, graph, case, random)
            expected, seen = on_cpu.run(names, feeds), on_cuda.run(names, feeds)
            errors = {n: relative(s, e) for n, s, e in zip(names, seen, expected, strict=True)}
            worst = max(errors.values())
            same = bool((seen[0].argmax(-1) == expected[0].argmax(-1)).all()) if graph == "decoder" else None
            errors_seen.append(worst)
            emit(f"{bundle.name} {path.stem} {name}", errors[names[0]], "rel", worst=worst, argmax=same)
    complete = len(errors_seen) == len(cases)
    emit(
        f"{bundle.name} {path.stem}, worst",
        float(np.max(errors_seen)) if complete else "failed",
        "rel",
        expected="< 0.01",
    )


def smoke() -> None:
    """Fails, and so ends what needs it, where the provider does not open."""
    ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, "cuda")
    emit("provider opens", True, expected="True")
    for name in BUNDLES:
        bundle = DEMO / name
        for graph, cases in {"decoder": CASES, "embed": {"prefill": CASES["prefill"]},
                             "vision": {"1": CASES["prefill"], "2": CASES["2 slots"]}}.items():  # fmt: skip
            with reported(f"{name} {graph}"):
                compare(bundle, graph, bundle / f"{graph}.onnx", cases)
        with reported(f"{name} by length"):
            compare(bundle, "decoder", lowered(bundle), CASES)


def graphs_on_its_stream() -> None:
    for form in ("decoder", "decoder-by-length"):
        graphs(DEMO / "float16" / f"{form}.onnx", Stream(), own_stream=False)


def graphs_on_our_stream() -> None:
    stream = Stream()
    emit("own stream", stream.made_by)
    for form in ("decoder", "decoder-by-length"):
        graphs(DEMO / "float16" / f"{form}.onnx", stream, own_stream=True)


def graphs(path: Path, stream: Stream, own_stream: bool) -> None:
    """Several CUDA graphs in one session, replayed in turn with other inputs, against eager steps of that session."""
    decoder = Decoder(path, stream, 4, 256, captures=True, own_stream=own_stream)
    shapes = [(1, 1, 64), (1, 1, 128), (2, 1, 64), (4, 1, 256), (1, 8, 128)]
    calls = [(Call(decoder, *shape), Call(decoder, *shape, graph=1 + n)) for n, shape in enumerate(shapes)]
    for shape, (eager, replay) in zip(shapes, calls, strict=True):
        replay.step()
        emit(f"graph {path.stem} {shape}", relative(replay.fresh_logits(), eager.fresh_logits()), "rel",
             own_stream=own_stream)  # fmt: skip
    random, worst = np.random.default_rng(5), 0.0
    for turn in range(12):
        eager, replay = calls[(5 * turn + 2) % len(calls)]
        slots, tokens, _ = eager.shape
        hidden = random.standard_normal((slots, tokens, decoder.dim)).astype(decoder.kind)
        for call in (eager, replay):
            call.values["hidden"].update_inplace(hidden)
        expected = eager.fresh_logits()
        seen = replay.fresh_logits()
        error = relative(seen, expected)
        worst = error if np.isnan(error) else max(worst, error)
    emit(f"graphs in turn {path.stem}", worst, "rel", expected="< 0.001", own_stream=own_stream)
    quick = calls[0][1]
    quick.queue()
    stream.wait()
    emit(f"replay without waiting {path.stem}", relative(np.array(quick.logits.numpy()), quick.fresh_logits()), "rel")


def answers() -> None:
    """The same tokens as the CPU's on pictures, and the command line over a folder."""
    from pixtral_runtime import load

    images = sorted((WORK / "images").iterdir())
    for name in ("float16", "int4-128"):
        with reported(f"answers {name}"):
            models = {backend: load(DEMO / name, backend=backend) for backend in ("ort-cpu", "ort-cuda")}
            for image in images:
                tokens, took = {}, {}
                for backend, model in models.items():
                    started = time.perf_counter()
                    answer = model.generate("What colour is the shape?", [str(image)], max_new_tokens=24)
                    took[backend] = round(time.perf_counter() - started, 2)
                    tokens[backend] = list(answer.token_ids)
                emit(f"answer {name} {image.stem[:20]} equal", tokens["ort-cpu"] == tokens["ort-cuda"], expected="True",
                     tokens=tokens, seconds=took)  # fmt: skip
    with reported("pixtral run"):
        output = WORK / "answers.jsonl"
        output.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pixtral_cli", "run", str(DEMO / "float16"), str(WORK / "images"), "-p",
                   "What?", "-o", str(output), "--backend", "ort-cuda", "--max-new-tokens", "16"]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        emit("pixtral run, exit code", done.returncode, expected="0", seconds=round(time.perf_counter() - started, 2),
             said=(done.stdout + done.stderr)[-600:])  # fmt: skip
