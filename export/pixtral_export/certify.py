"""Torch's part of a certificate: how far the bundle is from the eager float32 model, and how large activations grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pixtral_export.check import check_bundle, load_reference
from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.pixtral import Pixtral
from pixtral_runtime.bundle.certificate import Headroom
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.certify import Reference, certify
from pixtral_runtime.compare.replay import Replay
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import MemoryShortageError, PixtralError
from pixtral_runtime.generation.model import Model

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
    checkpoint: Checkpoint, warn: Callable[[str], None], model: Model, replay: Replay
) -> Reference | None:
    """None where memory is too short for the checkpoint in float32."""
    try:
        reference = load_reference(checkpoint, model.bundle.limits.max_context, available_memory_bytes())
    except MemoryShortageError as error:
        warn(f"the certificate was not compared with torch: {error}")
        return None
    errors: dict[str, float] = {}
    pictures = [(name, pixels[None]) for name, pixels in replay.vision_inputs().items()]
    with _largest_activations(reference) as headroom:
        for one in check_bundle(model, reference, pictures, replay.prompts.items()):
            errors[one.stage] = max(errors.get(one.stage, 0.0), one.error)
            if not one.passed:
                warn(
                    f"the bundle is far from its checkpoint: {one.stage} with {one.case}, {one.tensor} differs by "
                    f"{one.error:.1e} of its largest value, {one.tolerance:.0e} is usual"
                )
    return Reference("torch", errors, headroom)


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
