"""The runtime against transformers: the same weights and requests must give the same logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.reference import noise, reference_logits
from helpers.tiny import edit_json, tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime import Message, Model, Sampling, load
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import PREFILL_CHUNK_TOKENS
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.prompt import Prompt

ATOL = 1e-4  # float32 logits of magnitude 5; seen 8e-6
SIZES = ((80, 48), (16, 16), (33, 120), (256, 16))
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    return write_checkpoint(folder, tiny_config(), format="hf", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32"))


@pytest.fixture(scope="module")
def gelu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A checkpoint whose configuration names GELU in both towers, and a bundle that keeps it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("gelu"), tiny_config(), format="hf", dtype=torch.float32)

    def change(data: dict[str, Any]) -> None:
        data["text_config"]["hidden_act"] = data["vision_config"]["hidden_act"] = "gelu"

    edit_json(folder / "config.json", change)
    opened = open_checkpoint(folder, keep_activations=True)
    plan = plan_export(opened, ExportSettings("float32", max_context=1024))
    return folder, export(opened, plan, folder / "bundle", force=False, progress=lambda *_: None)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    model: Any = LlavaForConditionalGeneration
    return model.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def request(model: Model, images: int) -> Prompt:
    return model.prompts.build(user_message("What is shown here?", [noise(*size) for size in SIZES[:images]]))


@pytest.mark.parametrize("images", range(5))
def test_logits_and_greedy_tokens_equal_transformers(model: Model, reference: Any, images: int) -> None:
    prompt = request(model, images)
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    logits = model.runner.prefill(prompt, model.runner.encode_images(prompt), cache, all_logits=True)
    expected = reference_logits(reference, prompt, [])
    assert np.abs(expected).max() > 1  # logits that are all alike would prove nothing
    np.testing.assert_allclose(logits, expected, atol=ATOL)

    answer = model.answer(prompt, NEW_TOKENS)
    greedy: list[int] = []
    while len(greedy) < NEW_TOKENS and greedy[-1:] != [model.bundle.model.eos]:
        greedy.append(int(reference_logits(reference, prompt, greedy)[-1].argmax()))
    assert list(answer.token_ids) == greedy
    assert len(set(greedy)) > 1


def test_activations_that_were_kept_are_those_of_transformers(gelu: tuple[Path, Bundle], reference: Any) -> None:
    folder, bundle = gelu
    kind: Any = LlavaForConditionalGeneration
    other = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = load(bundle.path)
    prompt = request(model, 2)
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    logits = model.runner.prefill(prompt, model.runner.encode_images(prompt), cache, all_logits=True)
    np.testing.assert_allclose(logits, reference_logits(other, prompt, []), atol=ATOL)
    assert np.abs(logits - reference_logits(reference, prompt, [])).max() > 100 * ATOL  # SiLU answers otherwise


def test_a_bundle_with_other_activations_is_checked_with_them(gelu: tuple[Path, Bundle]) -> None:
    folder, bundle = gelu
    done = CliRunner().invoke(app, ["check", str(bundle.path), "--against", str(folder)])
    assert done.exit_code == 0 and "PASSED" in done.stdout, done.stderr


def test_cached_decode_equals_full_forward(model: Model, reference: Any) -> None:
    prompt, tokens = request(model, 2), [40, 300, 7, 511, 100]
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    model.runner.prefill(prompt, model.runner.encode_images(prompt), cache)
    start = len(prompt.token_ids)
    steps = [model.runner.decode_token(token, start + n, cache) for n, token in enumerate(tokens)]
    np.testing.assert_allclose(np.stack(steps), reference_logits(reference, prompt, tokens)[start:], atol=ATOL)


def test_a_prompt_of_several_chunks_and_cache_steps_equals_transformers(model: Model, reference: Any) -> None:
    images = [noise(256, 256), noise(160, 256)]
    prompt = model.prompts.build(user_message("What?", images))
    assert len(prompt.token_ids) > PREFILL_CHUNK_TOKENS
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    logits = model.runner.prefill(prompt, model.runner.encode_images(prompt), cache, all_logits=True)
    np.testing.assert_allclose(logits, reference_logits(reference, prompt, []), atol=ATOL)


def test_rows_of_an_earlier_request_do_not_leak(model: Model) -> None:
    """The cache is reused: a short request after a long one must give what it gives alone."""
    alone = load(model.bundle.path).answer(request(model, 1), NEW_TOKENS)
    model.answer(request(model, 4), NEW_TOKENS)
    assert model.answer(request(model, 1), NEW_TOKENS) == alone


def test_two_slots_of_different_length_decode_together(model: Model) -> None:
    """One decode step over two slots equals two steps over one: own write index, own positions."""
    sessions, config = model.runner.sessions, model.bundle.model.decoder
    prompts = [request(model, 0), request(model, 2)]
    singles = []
    both = sessions.decoder.new_cache(2, max(len(p.token_ids) for p in prompts) + 1)
    for slot, prompt in enumerate(prompts):
        cache = sessions.decoder.new_cache(1, both.rows)
        model.runner.prefill(prompt, model.runner.encode_images(prompt), cache)
        for whole, one in zip(both.layers(), cache.layers(), strict=True):
            for target, source in zip(whole, one, strict=True):
                target[slot] = source[0]
        singles.append(model.runner.decode_token(77, len(prompt.token_ids), cache))
    lengths = np.array([len(prompt.token_ids) for prompt in prompts])
    features = np.zeros((1, config.dim), np.float32)
    embedded = sessions.embed.run(
        {"token_ids": np.full((2, 1), 77), "image_features": features, "feature_index": np.full((2, 1), -1)}
    )
    feeds: dict[str, Any] = {
        "hidden": embedded["hidden"],
        "position_ids": lengths[:, None],
        "write_index": lengths,
        "logits_index": np.arange(2),
    }
    logits = sessions.decoder.run(feeds, both)["logits"].numpy()
    np.testing.assert_allclose(logits, np.stack(singles), atol=ATOL)


def test_images_of_one_grid_share_a_vision_batch(model: Model) -> None:
    vision = model.runner.sessions.vision
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 80)).astype(np.float32)
    together = vision.run({"pixels": pixels})["image_features"].numpy()
    alone = [vision.run({"pixels": image[None]})["image_features"].numpy()[0] for image in pixels]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_streaming_gives_the_text_of_the_answer(model: Model) -> None:
    image = noise(64, 48)
    answer = model.generate("Hm?", [image], max_new_tokens=NEW_TOKENS)
    assert "".join(model.stream("Hm?", [image], max_new_tokens=NEW_TOKENS)) == answer.text
    assert answer.prompt_tokens == len(model.prompts.build(user_message("Hm?", [image])).token_ids)
    assert answer.image_tokens == (4 + 1) * 3


def test_conversations_and_system_prompts_reach_the_model(model: Model) -> None:
    turns = [Message("user", (noise(32, 32), "Hi")), Message("assistant", ("Yes",)), Message("user", ("And?",))]
    alone = model.generate(turns[-1:], max_new_tokens=NEW_TOKENS)
    answers = {
        model.generate(turns, max_new_tokens=NEW_TOKENS).token_ids,
        model.generate([Message("system", ("Be brief.",)), *turns], max_new_tokens=NEW_TOKENS).token_ids,
        alone.token_ids,
    }
    assert len(answers) == 3


def test_sampling_depends_on_its_seed_only(model: Model) -> None:
    def run(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.5, top_p=1.0, seed=seed)
        return model.generate("Hi", max_new_tokens=NEW_TOKENS, sampling=sampling).token_ids

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_an_answer_ends_where_the_context_does(model: Model) -> None:
    """With a few tokens of room, and a sampling that seldom ends an answer by itself."""
    context = model.bundle.limits.max_context
    one, two = (len(model.prompts.build(user_message("go " * words)).token_ids) for words in (1, 2))
    prompt = model.prompts.build(user_message("go " * (1 + (context - 1 - one) // (two - one))))
    assert 0 < context - len(prompt.token_ids) <= two - one
    answer = model.answer(prompt, context, Sampling(temperature=50.0, top_p=1.0, seed=0))
    assert len(prompt.token_ids) + len(answer.token_ids) == context
    assert answer.finish_reason == "length"
    with pytest.raises(InputError, match="context"):
        model.generate("go " * context)


def test_times_cover_the_stages(model: Model) -> None:
    times = (answer := model.generate("Hm?", [noise(48, 64)], max_new_tokens=NEW_TOKENS)).times
    assert times.vision_ms > 0
    assert times.prefill_ms > 0
    assert times.decode_ms > 0
    assert times.decode_steps == len(answer.token_ids) - 1
