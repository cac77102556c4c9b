"""Members of Pixtral's family against transformers: each one's shape of configuration, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, Mistral3ForConditionalGeneration

from helpers.bundles import export_tiny
from helpers.family import MEMBERS, ORIGINAL_LENGTH
from helpers.reference import noise, reference_logits
from helpers.tiny import write_checkpoint
from pixtral_runtime import Model, load
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.inputs.conversation import user_message

ATOL = 1e-4  # float32 logits of magnitude 5
SIZES = ((84, 56), (28, 28), (33, 120), (252, 30))


def opened(config: ModelConfig, format: str, folder: Path) -> Model:
    checkpoint = write_checkpoint(folder / format, config, format=format, dtype=torch.float32)
    return load(export_tiny(checkpoint, folder / f"{format}-bundle", dtype="float32"))


@pytest.mark.parametrize("member", list(MEMBERS))
def test_logits_equal_transformers_in_every_format(member: str, tmp_path: Path) -> None:
    """Prompts of 0 to 4 images, prefilled and then decoded token by token, beyond YaRN's original length."""
    config = MEMBERS[member]
    models = {format: opened(config, format, tmp_path) for format in ("hf", "hf-new", "mistral")}
    kind: Any = Mistral3ForConditionalGeneration if config.adapter_norm else LlavaForConditionalGeneration
    reference = kind.from_pretrained(tmp_path / "hf-new", dtype=torch.float32, attn_implementation="eager").eval()
    model, *others = models.values()
    for images in range(5):
        prompt = model.prompts.build(
            user_message("What is shown here? " * 5, [noise(*size) for size in SIZES[:images]])
        )
        more = [40, 300, 7]
        expected = reference_logits(reference, prompt, more)
        assert np.abs(expected).max() > 1  # logits that are all alike would prove nothing
        for one in (model, *others) if images == 2 else (model,):
            cache = one.runner.sessions.decoder.new_cache(1, 1)
            logits = one.runner.prefill(prompt, one.runner.encode_images(prompt), cache, all_logits=True)
            start = len(prompt.token_ids)
            steps = [one.runner.decode_token(token, start + n, cache) for n, token in enumerate(more)]
            np.testing.assert_allclose(np.vstack([logits, *steps]), expected, atol=ATOL)
    assert start > 4 * ORIGINAL_LENGTH
