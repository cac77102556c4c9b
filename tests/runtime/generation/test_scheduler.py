"""Continuous batching: whoever shares a step with whom, each request gets the answer it gets alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.bundles import exported
from helpers.places import DEMO
from helpers.small_memory import Small
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Message, Model, Sampling, load
from pixtral_runtime.backends.ort_caches import whole_steps
from pixtral_runtime.bench.measure import Endless
from pixtral_runtime.errors import InputError, MemoryShortageError
from pixtral_runtime.generation.feature_cache import FeatureCache
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.image_features import LARGE_ON_DEVICE
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.generation.slots import LEAST_COPIED_ROWS
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.prompt import Prompt

SYSTEM = "You look at pictures of one shape on a plain ground. Answer in as few words as you can, and be exact."
GREEDY = Sampling()
QUESTIONS = ("what color is the shape?", "is there a circle?", "what shape is in the image?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return load(exported(DEMO, folder, ExportSettings(dtype="float32", max_context=600)).path)


def picture(index: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[8:-8, 8:-8] = pixels[0, 0]  # something to see, and another colour each time
    return Image.fromarray(pixels)


def prompts(model: Model, count: int, *, system: str | None = None) -> list[Prompt]:
    sizes = ((64, 64), (32, 64), (96, 64), (64, 64), (128, 128))
    return [
        model.prompts.build(user_message(QUESTIONS[n % 3], [picture(n, sizes[n % 5])], system)) for n in range(count)
    ]


def finish(scheduler: Scheduler, generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    """The generations' answers, in the order given, worked off together."""
    for generation in generations:
        scheduler.submit(generation)
    finished: list[Generation] = []
    while scheduler.busy:
        finished += scheduler.step()
    assert sorted(map(id, finished)) == sorted(map(id, generations))
    return [tuple(generation.token_ids) for generation in generations]


def alone(model: Model, prompt: Prompt, limit: int, sampling: Sampling = GREEDY) -> tuple[int, ...]:
    return tuple(Scheduler(model.bundle, model.runner).run(Generation(prompt, limit, sampling)))


LIMITS = (24, 3, 11, 1, 17, 6, 30)
"""Longest answers: slots become free at different times."""


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("drafts", [0, 4])
def test_answers_do_not_depend_on_batch_order_or_drafts(model: Model, slots: int, drafts: int) -> None:
    asked = list(zip(prompts(model, 14), itertools.cycle(LIMITS), strict=False))
    expected = [alone(model, prompt, limit) for prompt, limit in asked]
    assert len(set(expected)) > 5
    order = list(range(len(asked)))
    random.Random(slots).shuffle(order)
    scheduler = Scheduler(model.bundle, model.runner, slots, drafts=drafts)
    answers = finish(scheduler, [Generation(*asked[index]) for index in order])
    assert answers == [expected[index] for index in order]


def test_sampled_answers_do_not_depend_on_the_batch_either(model: Model) -> None:
    samplings = [Sampling(temperature=2.0, top_p=0.9, seed=seed) for seed in range(6)]
    asked = prompts(model, 6)
    expected = [alone(model, prompt, 12, sampling) for prompt, sampling in zip(asked, samplings, strict=True)]
    generations = [Generation(prompt, 12, sampling) for prompt, sampling in zip(asked, samplings, strict=True)]
    assert finish(Scheduler(model.bundle, model.runner, 4, drafts=3), generations) == expected
    assert len(set(expected)) == 6


class Watched:
    """A session that notes the shapes it was fed."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.shapes: list[dict[str, tuple[int, ...]]] = []

    def run(self, feeds: Any, cache: Any = None) -> Any:
        self.shapes.append({name: np.shape(value) for name, value in feeds.items() if isinstance(value, np.ndarray)})
        return self._session.run(feeds, cache)

    def new_cache(self, slots: int, rows: int) -> Any:
        return self._session.new_cache(slots, rows)


def watched(model: Model, slots: int, **options: Any) -> tuple[Scheduler, Watched, Watched]:
    """A scheduler over sessions of its own, with what its vision and decoder see."""
    sessions = model.runner.sessions
    vision, decoder = Watched(sessions.vision), Watched(sessions.decoder)
    runner = ModelRunner(model.bundle, replace(sessions, vision=vision, decoder=decoder))
    return Scheduler(model.bundle, runner, slots, **options), vision, decoder


def test_a_slot_that_is_done_is_filled_again_at_once(model: Model) -> None:
    """Two slots; one long answer and five short ones: the short ones take turns beside the long one."""
    scheduler, _, decoder = watched(model, 2)
    asked = prompts(model, 6)
    free = Sampling(temperature=50.0, top_p=1.0, seed=1)  # nearly uniform: no answer ends by itself
    finish(scheduler, [Generation(asked[0], 21, free), *(Generation(prompt, 5, free) for prompt in asked[1:])])
    widths = [shapes["write_index"][0] for shapes in decoder.shapes if shapes["position_ids"][1] == 1]
    assert widths.count(2) >= 20  # of the long one's 20 steps, none was made alone


def test_running_answers_wait_for_one_chunk_at_most(model: Model) -> None:
    """A prompt of many chunks is read beside a running answer, a chunk and a token in turn."""
    decoder = Watched(model.runner.sessions.decoder)
    sessions = replace(model.runner.sessions, decoder=decoder, chunk=16)
    scheduler = Scheduler(model.bundle, ModelRunner(model.bundle, sessions), 2)
    free = Sampling(temperature=50.0, top_p=1.0, seed=1)
    short = model.prompts.build(user_message("hi"))
    long = model.prompts.build(user_message("what is it? " * 30))
    scheduler.submit(Generation(short, 200, free))
    scheduler.step()
    scheduler.submit(generation := Generation(long, 1, free))
    before = len(decoder.shapes)
    while generation.finish_reason is None:
        scheduler.step()
    tokens = [shapes["position_ids"][1] for shapes in decoder.shapes[before:]]
    chunks = -(-(len(long.token_ids) - generation.reused_tokens) // 16)
    assert chunks > 4
    assert all(1 in pair for pair in itertools.pairwise(tokens))
    assert len([count for count in tokens if count > 1]) >= chunks - 1


def test_images_of_one_grid_share_a_vision_batch_and_one_image_is_encoded_once(model: Model) -> None:
    scheduler, vision, _ = watched(model, 4)
    same = [model.prompts.build(user_message(question, [picture(3)])) for question in QUESTIONS]
    others = [model.prompts.build(user_message("?", [picture(n, (48, 32))])) for n in range(4)]
    finish(scheduler, [Generation(prompt, 2) for prompt in (*same, *others)])
    batches = [shapes["pixels"] for shapes in vision.shapes]
    assert sum(shape[0] for shape in batches) == 1 + 4
    assert max(shape[0] for shape in batches) > 1
    assert {shape[2:] for shape in batches} == {(64, 64), (32, 48)}


@pytest.mark.parametrize(("free_bytes", "together"), [(None, 1), (1 << 40, LARGE_ON_DEVICE)])
def test_large_images_share_a_vision_batch_on_a_device(model: Model, free_bytes: int | None, together: int) -> None:
    vision = Watched(model.runner.sessions.vision)
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, vision=vision, free_bytes=free_bytes))
    side = model.bundle.limits.max_image_side // 2 + model.bundle.model.vision.patch_size
    asked = [model.prompts.build(user_message("?", [picture(n, (side, 32))])) for n in range(6)]
    finish(Scheduler(model.bundle, runner, 6), [Generation(prompt, 2) for prompt in asked])
    assert max(shapes["pixels"][0] for shapes in vision.shapes) == together


def test_images_are_encoded_once_where_features_are_kept_on_disk(model: Model, tmp_path: Path) -> None:
    asked = prompts(model, 6)
    expected = [alone(model, prompt, 6) for prompt in asked]
    for encoded in (6, 0):
        scheduler, vision, _ = watched(model, 3, features=FeatureCache(tmp_path, model.bundle.fingerprint, 1 << 30))
        assert finish(scheduler, [Generation(prompt, 6) for prompt in asked]) == expected
        assert sum(shapes["pixels"][0] for shapes in vision.shapes) == encoded


def test_the_shared_beginning_is_read_once(model: Model) -> None:
    """Prefill tokens drop by the prefix, from the second request on, in whichever slot; answers stay."""
    plain, shared = prompts(model, 8), prompts(model, 8, system=SYSTEM)
    prefix = len(shared[0].token_ids) - len(plain[0].token_ids)
    assert prefix > LEAST_COPIED_ROWS
    expected = [alone(model, prompt, 6) for prompt in shared]
    scheduler, _, decoder = watched(model, 3)
    generations = [Generation(prompt, 6) for prompt in shared]
    assert finish(scheduler, generations) == expected
    common = prefix + 2  # with <s> and [INST]
    assert [generation.reused_tokens for generation in generations] == [0, *[common] * 7]
    read = sum(shapes["position_ids"][1] for shapes in decoder.shapes if shapes["write_index"] == (1,))
    prefilled = sum(len(prompt.token_ids) for prompt in shared) - 7 * common
    assert read >= prefilled
    assert read <= prefilled + 8 * 6  # and lone decode steps


def test_another_question_about_an_image_reads_the_question_only(model: Model) -> None:
    image, other = picture(5), picture(6)
    asked = [
        model.prompts.build(user_message(question, [shown]))
        for question, shown in [(QUESTIONS[0], image), (QUESTIONS[1], image), (QUESTIONS[1], other)]
    ]
    expected = [alone(model, prompt, 6) for prompt in asked]
    scheduler, vision, _ = watched(model, 1)
    generations = [Generation(prompt, 6) for prompt in asked]
    assert finish(scheduler, generations) == expected
    block = asked[0].image_tokens + 2
    assert [generation.reused_tokens >= block for generation in generations] == [False, True, False]
    assert generations[2].reused_tokens == 2  # another picture of the same size: all but the control tokens differ
    assert len(vision.shapes) == 2


def test_a_later_turn_continues_from_the_turns_before(model: Model) -> None:
    first = Message("user", (picture(7), QUESTIONS[0]))
    scheduler = Scheduler(model.bundle, model.runner)
    prompt = model.prompts.build([first])
    tokens = list(scheduler.run(Generation(prompt, 6)))
    turns = [first, Message("assistant", (model.prompts.detokenize(tokens),)), Message("user", (QUESTIONS[1],))]
    later = model.prompts.build(turns)
    generation = Generation(later, 6)
    assert tuple(scheduler.run(generation)) == alone(model, later, 6)
    assert generation.reused_tokens >= len(prompt.token_ids)


def test_drafts_save_steps_where_an_answer_repeats(model: Model) -> None:
    """With a forced repetition each step keeps several tokens; the answer is the same."""
    prompt = prompts(model, 1)[0]

    class Loop:
        """A constraint that allows one token, from a cycle of three."""

        def __init__(self) -> None:
            self._cycle = itertools.cycle([300, 301, 302])
            self._next = next(self._cycle)
            self.is_complete = False

        def mask(self, logits: np.ndarray) -> np.ndarray:
            masked = np.full_like(logits, -np.inf)
            masked[self._next] = 0
            return masked

        def allows(self, ids: np.ndarray) -> np.ndarray:
            return np.asarray(ids == self._next)

        def accept(self, token: int) -> None:
            self._next = next(self._cycle)

    plain, drafted = (Generation(prompt, 40, constraint=Loop()) for _ in range(2))
    finish(Scheduler(model.bundle, model.runner), [plain])
    finish(Scheduler(model.bundle, model.runner, drafts=4), [drafted])
    assert drafted.token_ids == plain.token_ids
    assert plain.times.decode_steps == 39
    assert drafted.times.decode_steps < 15


def test_a_cache_shrinks_again_after_a_long_prompt(model: Model) -> None:
    scheduler = Scheduler(model.bundle, model.runner, 2)
    long = model.prompts.build(user_message("what is it? " * 110))
    short = prompts(model, 3)
    finish(scheduler, [Generation(long, 2)])
    assert scheduler._cache is not None
    assert scheduler._cache.rows == whole_steps(len(long.token_ids) + 1) > 512
    assert finish(scheduler, [Generation(short[0], 6)]) == [alone(model, short[0], 6)]
    assert scheduler._cache.rows == whole_steps(len(short[0].token_ids) + 6) < 256


def test_an_answer_ends_where_the_context_does_even_with_drafts(model: Model) -> None:
    words = model.prompts.build(user_message("what is it? " * 118))
    room = model.bundle.limits.max_context - len(words.token_ids)
    assert 0 < room < 30
    free = Sampling(temperature=50.0, top_p=1.0, seed=2)
    generations = [Generation(words, 100, free), Generation(prompts(model, 1)[0], 12, free)]
    answers = finish(Scheduler(model.bundle, model.runner, 2, drafts=5), generations)
    assert [len(answer) for answer in answers] == [room, 12]
    assert answers[0] == alone(model, words, 100, free)


def test_a_prompt_larger_than_an_engines_cache_is_refused_and_the_rest_goes_on(model: Model) -> None:
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, context=128))
    scheduler = Scheduler(model.bundle, runner, 2)
    with pytest.raises(InputError, match="128 rows") as raised:
        scheduler.submit(Generation(model.prompts.build(user_message("go " * 160))))
    assert "--context" in raised.value.hint and [option.name for option in raised.value.options] == ["image_tokens"]
    prompt = prompts(model, 1)[0]
    assert finish(scheduler, [Generation(prompt, 6)]) == [alone(model, prompt, 6)]


def test_a_stream_that_is_left_frees_its_slot(model: Model) -> None:
    scheduler, prompt = Scheduler(model.bundle, model.runner), prompts(model, 1)[0]
    stream = scheduler.run(Generation(prompt, 20))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not scheduler.busy
    assert tuple(scheduler.run(Generation(prompt, 20))) == alone(model, prompt, 20)


def test_cancelling_drops_what_waits_and_finishes_what_runs(model: Model) -> None:
    scheduler = Scheduler(model.bundle, model.runner, 2)
    generations = [Generation(prompt, 6) for prompt in prompts(model, 6)]
    for generation in generations:
        scheduler.submit(generation)
    finished = scheduler.step()
    scheduler.cancel()
    while scheduler.busy:
        finished += scheduler.step()
    assert {id(generation) for generation in finished} == {id(generation) for generation in generations[:2]}


def test_an_image_the_engine_does_not_take_fails_alone(model: Model) -> None:
    class Picky:
        def run(self, feeds: Any, cache: Any = None) -> Any:
            if feeds["pixels"].shape[-1] == 96:
                raise InputError("vision: too wide", "a wider one")
            return model.runner.sessions.vision.run(feeds, cache)

    picky: Any = Picky()
    scheduler = Scheduler(model.bundle, ModelRunner(model.bundle, replace(model.runner.sessions, vision=picky)), 2)
    generations = [Generation(prompt, 4) for prompt in prompts(model, 5)]
    finish(scheduler, generations)
    assert [generation.error is None for generation in generations] == [True, True, False, True, True]
    assert generations[0].token_ids == list(alone(model, generations[0].prompt, 4))


def test_where_memory_runs_out_fewer_slots_finish_the_work(model: Model) -> None:
    """Also in the midst of it; what was finished in the same step is not lost."""
    asked = prompts(model, 7)
    expected = [alone(model, prompt, 3 + index) for index, prompt in enumerate(asked)]
    decoder = Small(model.runner.sessions.decoder, 2, "write_index")
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, decoder=decoder))
    scheduler = Scheduler(model.bundle, runner, 6)
    assert finish(scheduler, [Generation(prompt, 3 + index) for index, prompt in enumerate(asked)]) == expected
    assert decoder.refused == 2 and scheduler.slots == 1


def test_what_ends_with_its_first_token_is_not_lost_where_the_next_prompt_finds_no_memory(model: Model) -> None:
    """Both are read in one step; the second one's chunk is what does not fit."""
    first, second = (Generation(prompt, limit) for prompt, limit in zip(prompts(model, 2), (1, 3), strict=True))
    session, chunks = model.runner.sessions.decoder, itertools.count(1)

    class FullOnce(Small):
        def run(self, feeds: Any, cache: Any = None) -> Any:
            if next(chunks) == 2:
                raise MemoryShortageError("too little memory")
            return super().run(feeds, cache)

    decoder = FullOnce(session, 2, "write_index")
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, decoder=decoder))
    finish(Scheduler(model.bundle, runner, 2), [first, second])
    assert len(first.token_ids) == 1 and first.error is None
    assert len(second.token_ids) == 3 and second.error is None


def test_where_one_slot_is_too_much_a_request_fails_with_the_reason(model: Model) -> None:
    decoder = Small(model.runner.sessions.decoder, 0, "write_index")
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, decoder=decoder))
    generations = [Generation(prompt, 3) for prompt in prompts(model, 3)]
    finish(Scheduler(model.bundle, runner, 2), generations)
    assert all(isinstance(generation.error, MemoryShortageError) for generation in generations)


def test_an_answer_under_a_schema_cannot_begin_again(model: Model) -> None:
    decoder = Small(model.runner.sessions.decoder, 1, "write_index")
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, decoder=decoder))
    bound, free = (
        Generation(prompt, 5, constraint=constraint)
        for prompt, constraint in zip(prompts(model, 2), (Endless(model.bundle.model.eos), None), strict=True)
    )
    finish(Scheduler(model.bundle, runner, 2), [bound, free])
    assert isinstance(bound.error, MemoryShortageError) and free.error is None


def test_images_that_are_too_many_together_are_encoded_one_by_one(model: Model) -> None:
    asked = prompts(model, 4)
    expected = [alone(model, prompt, 4) for prompt in asked]
    vision = Small(model.runner.sessions.vision, 1, "pixels")
    runner = ModelRunner(model.bundle, replace(model.runner.sessions, vision=vision))
    assert finish(Scheduler(model.bundle, runner, 4), [Generation(prompt, 4) for prompt in asked]) == expected
    assert vision.refused == 1
