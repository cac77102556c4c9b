"""Steps that recur are captured as CUDA graphs and replayed, over a stand-in; where that cannot be, runs are plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

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
from helpers.trt_surface import RTX_1_7
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


@pytest.mark.parametrize("moment", ["begin_capture", "end_capture", "execute"])
def test_a_capture_that_fails_leaves_plain_runs(moment: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start, at its end, and half-way, where TensorRT refuses the run that is being recorded."""
    device = HostDevice()
    if moment != "execute":
        method = getattr(device, moment)

        def failing() -> Any:
            if moment == "end_capture":
                method()
            raise MachineError("CUDA: operation not permitted when stream is capturing")

        monkeypatch.setattr(device, moment, failing)
    trts = (StandIn(device, capturable=moment != "execute"), StandIn(HostDevice()))
    sessions = [session(trt, bundle, "decoder", TrtSettings(cuda_graphs=True)) for trt in trts]
    caches = [decoder.new_cache(1, 4) for decoder in sessions]
    for position in range(4):
        feeds = step_feeds(bundle, hidden_of(bundle, 1, 1, seed=position), np.array([[position]]))
        runs = [decoder.run(feeds, cache)["logits"] for decoder, cache in zip(sessions, caches, strict=True)]
        np.testing.assert_array_equal(runs[0].numpy(), runs[1].numpy())
        del runs
    refusing, able = (decoder.graph_use for decoder in sessions)
    assert able.replayed == 3 and not able.refused
    assert (refusing.plain, refusing.replayed) == (4, 0) and "operation not permitted" in refusing.refused
    assert not device.is_recording


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
        (StandIn(HostDevice(), capturable=False), TrtSettings(cuda_graphs=True), "captured", "operation not permitted"),
        (StandIn(HostDevice(), RTX_1_7), TrtSettings(cuda_graphs=True), "built-in", ""),
        (StandIn(HostDevice(), RTX_1_7), TrtSettings(), "off", ""),
    ):
        decoder = session(trt, bundle, "decoder", settings)
        cache = decoder.new_cache(1, 4)
        for position in range(4):
            feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.array([[position]]))
            decoder.run(feeds, cache)
        assert decoder.graph_use.kind == kind and refused in decoder.graph_use.refused
        assert (decoder.graph_use.plain, decoder.graph_use.replayed) == (4, 0)
        strategies = RTX.CudaGraphStrategy
        expected = strategies.WHOLE_GRAPH_CAPTURE if kind == "built-in" else strategies.DISABLED
        assert trt.contexts[0].config.cuda_graph_strategy == expected


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
