"""Steps that recur are captured as CUDA graphs and replayed, over a stand-in; where that cannot be, runs are plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers import trt_standin
from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.networks import RTX
from helpers.places import DEMO
from helpers.trt_engines import (
    IMAGE,
    QUESTION,
    SHAPES,
    answer,
    engines,
    hidden_of,
    prompt_of,
    session,
    step_feeds,
)
from helpers.trt_standin import StandIn
from pixtral_export.plan import ExportSettings
from pixtral_runtime import load
from pixtral_runtime.backends.session import Buffer, GraphUse
from pixtral_runtime.backends.trt_session import TrtSession, TrtSettings
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import MachineError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


def test_a_recurring_step_is_captured_and_replayed(bundle: Bundle) -> None:
    device = HostDevice()
    model = engines(StandIn(device), bundle, TrtSettings(cuda_graphs=True))
    expected = answer(load(bundle.path), IMAGE)
    for _ in range(2):
        assert answer(model, IMAGE) == expected
    decoder, steps = model.runner.sessions.decoder, len(expected) - 1
    assert isinstance(decoder, TrtSession) and decoder.graph_use.kind == "captured"
    chunks = -(-len(prompt_of(model, IMAGE).token_ids) // SHAPES.chunk)
    assert decoder.graph_use.plain == 3  # the warm-ups of whole chunks, of the last chunk and of steps
    assert decoder.graph_use.plain + decoder.graph_use.replayed == chunks + 2 * steps + 1  # read once, but a token
    assert device.events.count("decoder") == decoder.graph_use.plain + 2  # chunks and steps run once while captured


def test_a_package_that_cannot_be_asked_whether_it_captures_is_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT proper has no `is_stream_capturable`."""
    monkeypatch.delattr(trt_standin.Context, "is_stream_capturable")
    model = engines(StandIn(HostDevice()), bundle, TrtSettings(cuda_graphs=True))
    assert answer(model, IMAGE) == answer(load(bundle.path), IMAGE)
    decoder = model.runner.sessions.decoder
    assert isinstance(decoder, TrtSession) and decoder.graph_use.replayed and not decoder.graph_use.refused


def test_a_capture_that_fails_leaves_plain_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    end_capture = device.end_capture

    def failing() -> Any:
        end_capture()
        raise MachineError("CUDA: cudaStreamEndCapture: operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "end_capture", failing)
    model = engines(StandIn(device), bundle, TrtSettings(cuda_graphs=True))
    assert answer(model, IMAGE) == answer(load(bundle.path), IMAGE)
    decoder = model.runner.sessions.decoder
    assert isinstance(decoder, TrtSession) and not decoder.graph_use.replayed
    assert "operation not permitted" in decoder.graph_use.refused


def test_a_captured_step_is_dropped_where_a_buffer_moves(bundle: Bundle) -> None:
    """Logits that the caller still holds keep their memory, so the next ones lie elsewhere."""
    sessions = [session(StandIn(HostDevice()), bundle, "decoder", TrtSettings(graphs)) for graphs in (True, False)]
    caches = [decoder.new_cache(1, 6) for decoder in sessions]
    kept: list[Buffer] = []
    for position in range(6):
        feeds = step_feeds(bundle, hidden_of(bundle, 1, 1, seed=position), np.array([[position]]))
        runs = [decoder.run(feeds, cache)["logits"] for decoder, cache in zip(sessions, caches, strict=True)]
        np.testing.assert_array_equal(runs[0].numpy(), runs[1].numpy())
        kept += runs if position == 2 else []
        del runs
    assert sessions[0].graph_use == GraphUse(
        "captured", plain=2, replayed=4, graphs=2
    )  # step 0 and the first with moved logits


def test_which_way_a_session_runs_is_on_record(bundle: Bundle) -> None:
    for trt, settings, kind, refused in (
        (StandIn(HostDevice()), TrtSettings(), "off", ""),
        (StandIn(HostDevice(), capturable=False), TrtSettings(cuda_graphs=True), "captured", "cannot be captured"),
        (StandIn(HostDevice(), built_in_graphs=True), TrtSettings(cuda_graphs=True), "built-in", ""),
        (StandIn(HostDevice(), built_in_graphs=True), TrtSettings(), "off", ""),
    ):
        decoder = session(trt, bundle, "decoder", settings)
        cache = decoder.new_cache(1, 4)
        for position in range(4):
            feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.array([[position]]))
            decoder.run(feeds, cache)
        assert decoder.graph_use.kind == kind and refused in decoder.graph_use.refused
        assert (decoder.graph_use.plain, decoder.graph_use.replayed) == (4, 0)
        config = trt.contexts[0].config
        assert hasattr(config, "cuda_graph_strategy") == (kind == "built-in")
        if kind == "built-in":
            assert config.cuda_graph_strategy == RTX.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_most_steps_of_a_batch_are_replayed(bundle: Bundle) -> None:
    """18 requests in 4 slots: each number of slots has a context, which the prompts in between do not disturb."""
    trt = StandIn(HostDevice())
    ours = engines(trt, bundle, TrtSettings(cuda_graphs=True), replace(SHAPES, batch=4))
    theirs = load(bundle.path)
    prompts = [theirs.prompts.build(user_message(f"{QUESTION} {'Be brief. ' * (n % 5)}", [], None)) for n in range(18)]
    answers = []
    for model in (theirs, ours):
        scheduler = Scheduler(bundle, model.runner, 4)
        generations = [Generation(prompt, 9 + n % 9) for n, prompt in enumerate(prompts)]
        for generation in generations:
            scheduler.submit(generation)
        while scheduler.busy:
            scheduler.step()
        answers.append([generation.token_ids for generation in generations])
    assert answers[0] == answers[1]
    plain = [runs for profile, runs in trt.runs("decoder") if profile == 1]
    share = 1 - sum(plain) / scheduler.times.decode_steps
    print(f"{scheduler.times.decode_steps} steps, {share:.0%} replayed, {len(plain)} contexts")
    assert share >= 0.9 and len(plain) == 3  # for 1, 2 and 4 slots
