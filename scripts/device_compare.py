"""Stages of the device check for right answers: CUDA against the CPU provider, which computes the same graphs there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from device_results import WORK, emit, reported
from device_weights import Bytes, fill, normal_values, weighted
from pixtral_runtime import load
from pixtral_runtime.backends.cuda import CudaDevice
from pixtral_runtime.backends.device_buffers import DeviceCache
from pixtral_runtime.backends.ort_cuda import CudaSettings, OrtCudaSession
from pixtral_runtime.backends.ort_session import open_graph
from pixtral_runtime.bundle.manifest import Bundle, open_bundle

Array = npt.NDArray[Any]

DEMOS = ("float16", "int4-128", "int4-32", "float16-kv8")
BY_LENGTH, MASKED = {"by length": CudaSettings()}, {"masked": CudaSettings(by_length=False)}
WITHOUT_CUDNN = "by length without cuDNN"  # whose attention ONNX Runtime prefers to Flash where it is there
SMALL = "< 0.02"  # the largest difference of a slot's logits by the largest of them
NEXT_CODES = "< 0.05"  # a coded cache: rounding decides between neighbors, which lie 1/127 of the scale apart
JUNK_RUNS = 3  # before a step is compared again: by then it is a CUDA graph


@dataclass(frozen=True)
class Case:
    """A call of `tokens` a slot, each slot's from its own row on, over a cache of at least `rows`."""

    name: str
    starts: tuple[int, ...]
    tokens: int
    rows: int


DEMO_CASES = (
    Case("prefill", (0,), 48, 64),
    Case("later chunk", (40,), 16, 64),
    Case("decode", (100,), 1, 128),
    Case("4 slots", (100, 3, 511, 0), 1, 512),
)
LARGE_CASES = (
    Case("1 × 256", (255,), 1, 256),
    Case("1 × 2,048", (2047,), 1, 2048),
    Case("8 × 256", (17, 255, 100, 200, 64, 128, 0, 31), 1, 256),
    Case("8 × 2,048", (17, 255, 900, 2047, 1024, 63, 1500, 2000), 1, 2048),
    Case("8 × 4,864", (17, 255, 900, 4863, 2048, 4095, 4096, 3000), 1, 4864),
    Case("prefill 256", (0,), 256, 2048),
    Case("prefill 256 from 1,024", (1024,), 256, 2048),
    Case("prefill 2,048", (0,), 2048, 2048),
    Case("prefill 2,048 from 2,048", (2048,), 2048, 4096),
)


@cache
def device() -> CudaDevice:
    """The one device of a stage's process."""
    return CudaDevice()


def relative(seen: Array, expected: Array) -> float:
    """The largest difference by the largest value; NaN where one of them has any."""
    a, b = seen.astype(np.float64), expected.astype(np.float64)
    return float(f"{np.abs(a - b).max() / max(np.abs(b).max(), 1e-30):.3g}")


# Stages


def smoke() -> None:
    """Fails, and so ends what needs it, where the provider does not open."""
    ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, "cuda")
    emit("provider opens", True, expected="True")
    for name in DEMOS:
        bundle = open_bundle(WORK / "demo" / name)
        with reported(f"{name} decoder"):
            expected = SMALL if bundle.kv_cache is None else NEXT_CODES
            compare_decoder(name, bundle, BY_LENGTH | MASKED, DEMO_CASES, expected=expected)
        with reported(f"{name} embed and vision"):
            compare_inputs(name, bundle)
    with reported("graphs in turn"):
        graphs_in_turn(open_bundle(WORK / "demo" / "float16"))


def widths() -> None:
    """Two layers of Pixtral-12B's widths in each form of attention, slots filled to different lengths."""
    for name in ("widths-float16", "widths-int4"):
        with reported(name), weighted(name) as bundle:
            cases = LARGE_CASES if name == "widths-float16" else LARGE_CASES[:-2]
            compare_decoder(name, bundle, BY_LENGTH | MASKED | {WITHOUT_CUDNN: CudaSettings()}, cases)


def answers() -> None:
    """The same tokens as the CPU's on pictures, and the command line over a folder."""
    images = sorted((WORK / "images").iterdir())
    for name in ("float16", "int4-128", "float16-kv8"):
        with reported(f"answers {name}"):
            models = {backend: load(WORK / "demo" / name, backend=backend) for backend in ("ort-cpu", "ort-cuda")}
            for image in images:
                tokens = {
                    backend: model.generate("What colour is the shape?", [str(image)], max_new_tokens=24).token_ids
                    for backend, model in models.items()
                }
                same = list(tokens["ort-cpu"]) == list(tokens["ort-cuda"])
                emit(f"answer {name} {image.stem[:15]} equal", same, expected="True", tokens=tokens)
    with reported("pixtral run"):
        output = WORK / "answers.jsonl"
        output.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pixtral_cli", "run", str(WORK / "demo/float16"), str(WORK / "images"), "-p",
                   "What?", "-o", str(output), "--backend", "ort-cuda", "--max-new-tokens", "16"]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        emit("pixtral run, exit code", done.returncode, expected="0", seconds=round(time.perf_counter() - started, 2),
             said=(done.stdout + done.stderr)[-600:])  # fmt: skip


# The decoder


def compare_decoder(
    name: str, bundle: Bundle, forms: Mapping[str, CudaSettings], cases: Sequence[Case], *, expected: str = SMALL
) -> None:
    """Logits and cache of each case in each form, and of a replayed CUDA graph where the case is a decode step."""
    on_cpu = open_graph(bundle.graph_path("decoder"), accuracy_level=1)
    sessions = {}
    for form, settings in forms.items():
        with without_cudnn_attention() if form == WITHOUT_CUDNN else nullcontext():
            sessions[form] = OrtCudaSession(bundle, "decoder", device(), settings)
    worst: dict[str, list[float]] = {form: [] for form in forms}
    for case in cases:
        first = next(iter(sessions.values())).new_cache(len(case.starts), case.rows)
        content = cache_content(first)
        feeds = decoder_feeds(bundle, case, np.random.default_rng(case.rows))
        wanted = ["logits", *(present.name for _, present in bundle.graph_spec("decoder").caches[-2:])]
        portable = {name: array for name, array in feeds.items() if name != "inverse_temperature"}
        right = on_cpu.run(wanted, portable | content)
        del first
        for form, session in sessions.items():
            figure = f"{name} {form}, {case.name}"
            worst[form].append(float("nan"))
            with reported(figure):
                worst[form][-1] = compare_case(figure, session, case, feeds, content, right)
    for form, errors in worst.items():
        emit(f"{name} {form}, worst", float(np.max(errors)), "rel", expected=expected, cases=len(errors))


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """For sessions that are opened in here."""
    os.environ["ORT_ENABLE_CUDNN_FLASH_ATTENTION"] = "0"
    try:
        yield
    finally:
        del os.environ["ORT_ENABLE_CUDNN_FLASH_ATTENTION"]


def compare_case(
    figure: str, session: OrtCudaSession, case: Case, feeds: dict[str, Array], content: dict[str, Array],
    right: Sequence[Array],
) -> float:  # fmt: skip
    """Report a case's differences. Returns the largest."""
    past = session.new_cache(len(case.starts), case.rows)
    logits, picked, *outcome = run_fresh(session, feeds, past, content)
    slots = [relative(seen, wanted) for seen, wanted in zip(logits, right[0], strict=True)]
    written, untouched = 0.0, True
    for seen, wanted, before in zip(outcome, right[1:], list(content.values())[-2:], strict=True):
        due = before.copy()
        for slot, start in enumerate(case.starts):
            new = slice(start, start + case.tokens)
            written = max(written, relative(seen[slot, :, new], wanted[slot, :, new]))
            due[slot, :, new] = seen[slot, :, new]
        untouched &= np.array_equal(seen, due)
    errors = [*slots, written]
    same = int((logits.argmax(-1) == right[0].argmax(-1)).sum())
    more: dict[str, Any] = {}
    if case.tokens == 1:
        replayed = session.graph_use.replayed
        other = {name: np.roll(array, 1, axis=0) for name, array in feeds.items()} | {"hidden": feeds["hidden"] * 2}
        for _ in range(JUNK_RUNS):
            session.run(other, past)
        again, picked_again, *_ = run_fresh(session, feeds, past, content)
        errors.append(relative(again, right[0]))
        picked &= picked_again
        more = {"replay": errors[-1], "replay_to_plain": relative(again, logits)}
        more["replayed"] = session.graph_use.replayed > replayed
    worst = float(np.max(errors)) if untouched and picked else float("inf")
    emit(
        figure, worst, "rel", slots=slots, cache=written, untouched=untouched, argmax=f"{same} of {len(slots)}", **more
    )
    return worst


def run_fresh(
    session: OrtCudaSession, feeds: dict[str, Array], past: DeviceCache, content: dict[str, Array]
) -> tuple[Array, bool, Array, Array]:
    """Logits, whether their candidates are right, and the last layer's keys and values: a run over this content."""
    for name, address in past.by_name().items():
        device().copy_to_device(address, turned(content[name], past))
    outputs = session.run(feeds, past)
    logits = outputs["logits"].numpy()
    picked = right_candidates(logits, outputs["picked"].numpy(), feeds["inverse_temperature"])
    return logits, picked, *past.layers()[-1]


def turned(array: Array, past: DeviceCache) -> Array:
    """Keys or values (slots, K, rows, E) as they lie in memory."""
    return array if past.bound_shape == past.shape else np.ascontiguousarray(array.swapaxes(1, 2))


def right_candidates(logits: Array, picked: Array, inverse: Array) -> bool:
    """Whether the candidates are the best of these logits, and the mass what the rows weigh."""
    count = picked.shape[1] // 2
    best = -np.sort(-logits, axis=1)[:, :count]
    ids = picked[:, count : 2 * count].astype(np.int64)
    mass = np.exp((logits - best[:, :1]).astype(np.float64) * inverse[:, None]).sum(1)
    named = np.take_along_axis(logits, ids, 1)
    return bool((best == picked[:, :count]).all() and (best == named).all() and np.allclose(picked[:, -1], mass, 1e-4))


def decoder_feeds(bundle: Bundle, case: Case, random: np.random.Generator) -> dict[str, Array]:
    slots, starts = len(case.starts), np.array(case.starts, np.int64)
    hidden = random.standard_normal((slots, case.tokens, bundle.model.decoder.dim), np.float32)
    return {
        "hidden": hidden.astype(bundle.dtype),
        "position_ids": starts[:, None] + np.arange(case.tokens),
        "write_index": starts,
        "logits_index": np.arange(1, slots + 1, dtype=np.int64) * case.tokens - 1,
        "inverse_temperature": np.full(slots, 0.7, np.float32),
    }


def cache_content(past: DeviceCache) -> dict[str, Array]:
    """Random keys and values for all of a cache, by the names of its tensors.

    Of a size that makes attention a good part of what the logits are made of: the mean of thousands of small values
    would be next to nothing, and hide an error.
    """
    content = {}
    for number, name in enumerate(past.by_name()):
        content[name] = np.empty(past.shape, past.dtype)
        source = cache_values({"key": 2, "value": 8}[name.split("_")[1]], past.dtype.itemsize)
        fill(content[name].reshape(-1).view(np.uint8), source, 122 * number)
    return content


@cache
def cache_values(scale: int, itemsize: int) -> Bytes:
    """Normal values in float16, or as codes of int8."""
    values = normal_values(scale)
    if itemsize > 1:
        return values
    codes = np.rint(12 * values.view(np.float16).astype(np.float32)).clip(-127, 127).astype(np.int8)
    return codes.view(np.uint8)


# The other graphs


def compare_inputs(name: str, bundle: Bundle) -> None:
    """What goes into the decoder: embedded tokens, and features of one and of two pictures."""
    random, side = np.random.default_rng(0), 4 * bundle.model.vision.token_edge
    index = np.where(np.arange(48) < 3, np.arange(48), -1)[None]
    features = random.standard_normal((4, bundle.model.decoder.dim)).astype(bundle.dtype)
    tokens = random.integers(0, 256, (1, 48))
    feeds = {"embed": [{"token_ids": tokens, "image_features": features, "feature_index": index}],
             "vision": [{"pixels": random.standard_normal((count, 3, side, side)).astype(bundle.dtype)}
                        for count in (1, 2)]}  # fmt: skip
    for graph, calls in feeds.items():
        on_cpu, session = open_graph(bundle.graph_path(graph)), OrtCudaSession(bundle, graph, device(), CudaSettings())
        errors = [relative(next(iter(session.run(call).values())).numpy(), on_cpu.run(None, call)[0]) for call in calls]
        emit(f"{name} {graph}", float(np.max(errors)), "rel", expected="< 0.01", calls=errors)


def graphs_in_turn(bundle: Bundle) -> None:
    """CUDA graphs of several shapes in one session, replayed in turn with new inputs, against plain runs."""
    replays = OrtCudaSession(bundle, "decoder", device(), CudaSettings())
    plain = OrtCudaSession(bundle, "decoder", device(), CudaSettings(cuda_graphs=False))
    shapes = [
        Case("", tuple(range(3, 3 + slots)), 1, rows) for slots, rows in ((1, 512), (1, 1024), (2, 512), (4, 512))
    ]
    caches = [[session.new_cache(len(case.starts), case.rows) for session in (replays, plain)] for case in shapes]
    random, errors = np.random.default_rng(5), []
    for turn in range(32):
        case, pasts = shapes[3 * turn % 4], caches[3 * turn % 4]
        feeds = decoder_feeds(bundle, case, random)
        seen, expected = (
            session.run(feeds, past)["logits"].numpy() for session, past in zip((replays, plain), pasts, strict=True)
        )
        errors.append(relative(seen, expected))
    use = replays.graph_use
    emit("graphs in turn", float(np.max(errors)), "rel", expected="< 0.001", graphs=use.graphs, replayed=use.replayed)
