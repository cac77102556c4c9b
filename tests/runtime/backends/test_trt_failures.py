"""What TensorRT or the device refuses while a bundle is opened or runs is an error of ours, with exit code 4."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.networks import RTX
from helpers.places import DEMO
from helpers.trt_engines import SHAPES, engine_file, engines, hidden_of, session, step_feeds
from helpers.trt_standin import StandIn
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.trt_package import log_of
from pixtral_runtime.backends.trt_session import TrtSession
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import MachineError, MemoryShortageError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message

CUDA_SHORTAGE = "[defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)"
SHORTAGES = (
    CUDA_SHORTAGE,
    "[executionContext.cpp::ExecutionContext::470] Error Code 2: OutOfMemory (no further information)",
    "Requested amount of GPU memory (17920000000 bytes) could not be allocated.",
)
FAULT = "[enqueue.cpp::enqueue::12] Error Code 1: Cuda Runtime (an illegal memory access was encountered)"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("float16") / "b", ExportSettings())


def step(decoder: TrtSession, bundle: Bundle, position: int = 0) -> None:
    feeds = step_feeds(bundle, hidden_of(bundle, 1, 1), np.array([[position]]))
    decoder.run(feeds, decoder.new_cache(1, 1))["logits"].numpy()


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("deserialize_cuda_engine", "cannot load .*decoder.engine"),
        ("create_execution_context", "cannot prepare the decoder engine"),
        ("execute_async_v3", "cannot run the decoder engine"),
    ],
)
@pytest.mark.parametrize("message", [*SHORTAGES, FAULT])
def test_what_tensorrt_cannot_do_is_an_error_of_ours(method: str, what: str, message: str, bundle: Bundle) -> None:
    trt = StandIn(HostDevice())
    decoder = session(trt, bundle, "decoder") if method == "execute_async_v3" else None
    trt.refusals[method] = message
    open_or_step: Callable[[], object] = (
        partial(step, decoder, bundle) if decoder else partial(session, trt, bundle, "decoder")
    )
    with pytest.raises(MachineError, match=what) as raised:
        open_or_step()
    assert message in str(raised.value) and raised.value.exit_code == 4 and raised.value.hint
    assert isinstance(raised.value, MemoryShortageError) == (message in SHORTAGES)
    assert (raised.value.options != ()) == (message in SHORTAGES)
    trt.refusals.clear()
    step(decoder or session(trt, bundle, "decoder"), bundle)  # nothing is broken by it


@pytest.mark.parametrize("free", [0, 1 << 12, 1 << 16])
def test_a_device_that_is_full_at_a_step_says_so(free: int, bundle: Bundle) -> None:
    """Memory to compute in, of feeds or of outputs."""
    device = HostDevice()
    decoder = session(StandIn(device), bundle, "decoder")
    decoder.new_cache(1, 1)
    device.most_bytes = sum(memory.size for memory in device.memory.values()) + free
    with pytest.raises(MemoryShortageError, match="too little memory") as raised:
        step(decoder, bundle)
    assert raised.value.exit_code == 4


def test_an_error_of_before_is_not_taken_for_this_one(bundle: Bundle) -> None:
    trt = StandIn(HostDevice())
    log = log_of(trt)
    log.errors.append(CUDA_SHORTAGE)
    (path := engine_file(bundle, "decoder", SHAPES).with_name("other.engine")).write_bytes(b"something else")
    with pytest.raises(MachineError, match="magic tag") as raised:
        TrtSession(trt, path, bundle, "decoder", trt.device)
    assert not isinstance(raised.value, MemoryShortageError)


def test_each_warning_of_tensorrt_is_passed_on_once(caplog: pytest.LogCaptureFixture) -> None:
    log = log_of(StandIn(HostDevice()))
    severities = RTX.ILogger
    for severity, text in (
        (severities.WARNING, "Using an engine plan file across different models of devices is not recommended"),
        (severities.WARNING, "ModelImporter.cpp:1071: Make sure input token_ids has Int64 binding."),
        (severities.INFO, "Loaded engine size: 6 GiB"),
        (severities.WARNING, "another"),
        (severities.WARNING, "another"),
        (severities.ERROR, CUDA_SHORTAGE),
    ):
        log.logger.log(severity, text)
    said = [(record.levelno, record.getMessage().partition(":")[0]) for record in caplog.records]
    assert said == [(logging.WARNING, "TensorRT")] * 2
    assert "different models" in caplog.records[0].getMessage() and len(log.warnings) == 4


@pytest.mark.parametrize("slots", [2, 1])
def test_a_job_goes_on_with_fewer_slots_where_the_device_is_full(slots: int, bundle: Bundle) -> None:
    """What two slots took is free for one; a request that one slot is too much for takes nothing from the next."""
    trt = StandIn(device := HostDevice())
    model = engines(trt, bundle)
    expected = model.generate("what is it?", max_new_tokens=4).token_ids
    prompt = model.prompts.build(user_message("what is it?", [], None))
    scheduler = Scheduler(bundle, model.runner, slots)
    scheduler._cache.reserve(1)
    gc.collect()
    device.most_bytes = sum(memory.size for memory in device.memory.values())
    trt.refusals["execute_async_v3"] = CUDA_SHORTAGE
    generations = [Generation(prompt, 4) for _ in range(2)]
    for generation in generations:
        scheduler.submit(generation)
    scheduler.step()
    trt.refusals.clear()
    while scheduler.busy:
        scheduler.step()
    lost = [generation for generation in generations if generation.error]
    assert all(isinstance(generation.error, MemoryShortageError) for generation in lost)
    assert len(lost) == (slots == 1) and scheduler.slots == 1
    assert all(tuple(generation.token_ids) == expected for generation in generations if not generation.error)
