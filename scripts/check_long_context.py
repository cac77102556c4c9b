"""A hundred pictures in one request, far beyond the length a model was trained on at first, against transformers.

    python scripts/check_long_context.py                      # some 4 minutes on 2 cores, 2 GB of memory
    python scripts/check_long_context.py --images 20

A tiny random model of Ministral 3's kind: merged patches, YaRN by 16 and scaled queries from 8,192 tokens on. Each
picture takes 506 tokens. Compares one picture's features, and the logits of the prompt's last token and of three
decoded ones. transformers gets the features that were compared, because its tower would see all pictures as one
sequence. The last line is JSON; exits 1 where logits of magnitude 3 differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Mistral3ForConditionalGeneration

from make_synthetic_checkpoint import write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime import load
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, QueryScale, VisionConfig, Yarn
from pixtral_runtime.inputs.conversation import user_message

SIDE = 616  # pixels: 22 tokens
LENGTH = 8192  # tokens; the model's original context
CONTEXT = 65_536
STEP = 512  # tokens that transformers reads at a time
NEXT = (40, 300, 7)  # tokens to decode
TOLERANCE = 1e-4


def tiny() -> ModelConfig:
    return ModelConfig(
        VisionConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=96,
            patch_size=14, image_size=SIDE, rope_theta=1e4, spatial_merge_size=2,
        ),
        DecoderConfig(
            dim=96, n_layers=2, head_dim=32, hidden_dim=160, n_heads=4, n_kv_heads=2, vocab_size=512, rope_theta=1e6,
            yarn=Yarn(16.0, LENGTH), query_scale=QueryScale(0.1, LENGTH), max_position=16 * LENGTH,
        ),
        adapter_bias=False,
        adapter_norm=True,
    )  # fmt: skip


def check(images: int, folder: Path) -> dict[str, float]:
    write_checkpoint(folder / "checkpoint", tiny(), format="hf-new")
    checkpoint = open_checkpoint(folder / "checkpoint")
    plan = plan_export(checkpoint, ExportSettings(dtype="float32", max_context=CONTEXT))
    model = load(export(checkpoint, plan, folder / "bundle", force=False, progress=lambda *_: None).path)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(images)]
    prompt = model.prompts.build(user_message("What differs?", pictures))
    started = time.monotonic()
    features = np.asarray(model.runner.encode_images(prompt), np.float32)
    start = len(prompt.token_ids)
    cache = model.runner.sessions.decoder.new_cache(1, start + len(NEXT))
    seen = [np.asarray(model.runner.prefill(prompt, features, cache)).reshape(-1)]
    seen += [np.asarray(model.runner.decode_token(token, start + n, cache)) for n, token in enumerate(NEXT)]
    ours_s = time.monotonic() - started

    kind = Mistral3ForConditionalGeneration
    reference = kind.from_pretrained(folder / "checkpoint", dtype=torch.float32, attn_implementation="sdpa").eval()
    last = prompt.images[-1]
    with torch.inference_mode():
        own = reference.get_image_features(
            pixel_values=torch.from_numpy(last)[None], image_sizes=torch.tensor([last.shape[1:]])
        ).pooler_output[0]
        feature_error = float((torch.from_numpy(features[-len(own) :]) - own).abs().max())
        ids = torch.tensor([[*prompt.token_ids.tolist(), *NEXT]])
        text = reference.model.language_model
        hidden, index = text.embed_tokens(ids), torch.from_numpy(np.asarray(prompt.feature_index))
        hidden[0, : len(index)][index >= 0] = torch.from_numpy(features)[index[index >= 0]]
        cached, states = None, []
        for at in range(0, ids.shape[1], STEP):
            out = text(inputs_embeds=hidden[:, at : at + STEP], past_key_values=cached, use_cache=True)
            cached = out.past_key_values
            states.append(out.last_hidden_state)
        expected = reference.lm_head(torch.cat(states, 1)[0, -len(seen) :]).numpy()
    return {
        "images": images,
        "prompt_tokens": start,
        "feature_error": feature_error,
        "logit_error": float(np.abs(np.stack(seen) - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "ours_s": round(ours_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = check(args.images, Path(folder))
    print(json.dumps(result))
    sys.exit(0 if result["logit_error"] <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
