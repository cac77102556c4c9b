"""A bundle with an adapter against transformers with the same adapter, merged by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Mistral3ForConditionalGeneration

from helpers.adapters import random_pairs, write_mistral_lora, write_peft
from helpers.family import MEMBERS
from helpers.reference import noise, reference_logits
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_export.checkpoint.hub import open_source
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime import load
from pixtral_runtime.bundle.manifest import PARTIAL, Bundle
from pixtral_runtime.inputs.conversation import user_message

ATOL = 1e-4  # float32 logits of magnitude 5


def exported(checkpoint: Path, target: Path, lora: Path | None, stop_after: int = -1, **settings: Any) -> Bundle:
    opened = open_source(str(checkpoint), lora=lora)
    plan = plan_export(opened, ExportSettings(dtype="float32", max_context=1024, **settings))

    def progress(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("calibrating", stop_after):
            raise KeyboardInterrupt

    return export(opened, plan, target, force=False, progress=progress)


def test_logits_equal_those_of_transformers_with_the_adapter(tmp_path: Path) -> None:
    config = MEMBERS["Ministral-3-8B"]
    pairs = random_pairs(config)
    base = write_checkpoint(tmp_path / "base", config, format="hf-new", dtype=torch.float32)
    adapter = write_peft(tmp_path / "adapter", pairs, use_rslora=True)
    plain: Any = Mistral3ForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    merged: Any = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()

    bundle = exported(base, tmp_path / "bundle", adapter)
    model = load(bundle.path)
    prompt = model.prompts.build(user_message("What is shown here? " * 5, [noise(84, 56), noise(33, 120)]))
    more = [40, 300, 7]
    expected = reference_logits(merged.eval(), prompt, more)
    cache = model.runner.sessions.decoder.new_cache(1, 1)
    logits = model.runner.prefill(prompt, model.runner.encode_images(prompt), cache, all_logits=True)
    steps = [model.runner.decode_token(token, len(prompt.token_ids) + n, cache) for n, token in enumerate(more)]
    np.testing.assert_allclose(np.vstack([logits, *steps]), expected, atol=ATOL)

    without = exported(base, tmp_path / "without", None)
    assert without.lora is None and without.fingerprint != bundle.fingerprint
    other = load(without.path)
    cache = other.runner.sessions.decoder.new_cache(1, 1)
    plain_logits = other.runner.prefill(prompt, other.runner.encode_images(prompt), cache, all_logits=True)
    assert np.abs(plain_logits - logits).max() > 1  # the adapter has something to say


def test_the_same_adapter_gives_the_same_bytes_in_either_format(tmp_path: Path) -> None:
    config = tiny_config()
    pairs = random_pairs(config)
    base = write_checkpoint(tmp_path / "base", config)
    peft = write_peft(tmp_path / "peft", pairs)
    lora = write_mistral_lora(tmp_path / "mistral", config, pairs, {"enable": True, "rank": 4, "scaling": 2.0})
    first, again, other = (exported(base, tmp_path / f"b{n}", one) for n, one in enumerate((peft, peft, lora)))
    manifests = [json.loads((bundle.path / "bundle.json").read_text()) for bundle in (first, again)]
    assert manifests[0] == manifests[1]
    assert first.fingerprint == other.fingerprint
    assert (first.lora and first.lora.name, other.lora and other.lora.name) == ("peft", "mistral")


def test_an_interrupted_calibration_with_another_adapter_starts_anew(tmp_path: Path) -> None:
    config = tiny_config()
    pairs = random_pairs(config)
    base = write_checkpoint(tmp_path / "base", config)
    journal = tmp_path / "b" / PARTIAL / "calibration" / "journal.json"

    def units(lora: Path | None, stop_after: int) -> int:
        """How many units the journal has when an export is interrupted that early."""
        with pytest.raises(KeyboardInterrupt):
            exported(base, tmp_path / "b", lora, stop_after, precision="int8", calibration_samples=2)
        return len(json.loads(journal.read_text())["units"])

    adapter = write_peft(tmp_path / "adapter", pairs)
    assert units(adapter, 3) == 3
    assert units(adapter, 1) == 3  # the same goes on
    assert units(write_peft(tmp_path / "adapter", pairs, lora_alpha=9), 1) == 1  # another scaling, the same weights
    assert units(adapter, 3) == 3
    assert units(write_peft(tmp_path / "adapter", random_pairs(config, rank=2), r=2, lora_alpha=9), 1) == 1
    assert units(None, 1) == 1
