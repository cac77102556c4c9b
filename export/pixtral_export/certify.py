"""Torch's part of a certificate: how far the bundle is from the eager float32 model, and how large activations grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from pixtral_export.check import load_reference, reference_logits, tolerance_of
from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.pixtral import Pixtral
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.certificate import Headroom
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.certify import Reference, certify
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.compare.replay import LAYERED, Replay, Tokens
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import MemoryShortageError, PixtralError
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.model_runner import on_host

VISION = ("vision_encoder", "vision_language_adapter")
EMBED = "tok_embeddings"


def certify_export(bundle: Bundle, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    """Write the certificate of a bundle that was just made. What it lacks is said, and no reason to lose the bundle."""
    try:
        certificate = certify(bundle, partial(_against_torch, checkpoint, warn))
    except PixtralError as error:
        warn(f"no certificate was made: {error}")
        return
    if certificate.omitted:
        warn(f"the certificate has no tensors: {certificate.omitted}")


def _against_torch(
    checkpoint: Checkpoint, warn: Callable[[str], None], model: Model, replay: Replay, said: Mapping[str, Tokens]
) -> Reference | None:
    """None where memory is too short for the checkpoint in float32 and as much again."""
    available = available_memory_bytes()
    try:
        spare = None if available is None else available // 2
        reference = load_reference(checkpoint, model.bundle.limits.max_context, spare)
    except MemoryShortageError as error:
        warn(f"the certificate was not compared with torch: {error}")
        return None
    errors: dict[str, float] = {}
    with torch.inference_mode(), _largest_activations(reference) as headroom:
        for stage, seen, expected in _compared(model, replay, reference, said):
            errors[stage] = max(errors.get(stage, 0.0), relative_error(seen, expected.numpy()))
    stage = max(errors, key=lambda name: errors[name])
    allowed = tolerance_of(model.bundle)
    if not errors[stage] <= allowed:
        warn(
            f"the bundle is far from its checkpoint: {stage} differs by {errors[stage]:.1e} of the largest value, "
            f"{allowed:.0e} is usual"
        )
    return Reference("torch", errors, headroom)


def _compared(
    model: Model, replay: Replay, reference: Pixtral, said: Mapping[str, Tokens]
) -> Iterator[tuple[str, Array, torch.Tensor]]:
    """Stage, what the bundle makes of it, and torch, which reads a prompt and its known answer in one pass."""
    runner = model.runner
    for pixels in replay.vision_inputs().values():
        yield "vision", on_host(runner.encode([pixels])[0]), reference.image_features(torch.from_numpy(pixels[None]))[0]
    for name in (name for name in LAYERED if name in replay.prompts):
        prompt, read = replay.prompts[name], said[name][:-1]
        length = len(prompt.token_ids)
        features = [reference.image_features(torch.from_numpy(image[None]))[0] for image in prompt.images]
        table = torch.cat(features) if features else torch.zeros(1, reference.config.decoder.dim)
        ids = torch.from_numpy(np.append(prompt.token_ids, np.array(read, np.int64)))
        index = torch.from_numpy(np.append(prompt.feature_index, np.full(len(read), -1)))
        encoded = runner.encode_images(prompt)
        yield (
            "embed",
            runner.embed(prompt, encoded),
            reference.tok_embeddings(ids[None], table, index[None])[0, :length],
        )
        expected = reference_logits(reference, ids, index, table)
        cache = runner.sessions.decoder.new_cache(1, len(ids))
        yield "prefill", runner.prefill(prompt, encoded, cache, all_logits=True), expected[:length]
        steps = [runner.decode_token(token, length + place, cache) for place, token in enumerate(read)]
        if steps:
            yield "decode", np.stack(steps), expected[length:]


@contextmanager
def _largest_activations(reference: Pixtral) -> Iterator[dict[str, Headroom]]:
    """By graph, the layer whose output grew largest while the model ran; whole when the block ends."""
    found: dict[str, Headroom] = {}

    def observe(name: str, graph: str, module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            largest = float(output.abs().max())
            if graph not in found or largest > found[graph].largest:
                found[graph] = Headroom(name, largest)

    hooks = []
    for name, module in reference.named_modules():
        if name and name != "output":  # logits are float32 in every bundle
            part = name.partition(".")[0]
            graph = "vision" if part in VISION else "embed" if part == EMBED else "decoder"
            hooks.append(module.register_forward_hook(partial(observe, name, graph)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
