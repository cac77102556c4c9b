"""What transformers computes for a prompt of ours, and pictures to ask about."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from pixtral_runtime.inputs.prompt import Prompt


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def reference_logits(reference: Any, prompt: Prompt, more: list[int]) -> np.ndarray:
    """Logits (T, V) of transformers' full forward pass over the prompt and `more` tokens."""
    ids = torch.tensor([[*prompt.token_ids.tolist(), *more]])
    inputs = {}
    if prompt.images:
        sizes = [image.shape[1:] for image in prompt.images]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        padded = np.zeros((len(sizes), 3, height, width), np.float32)
        for target, image in zip(padded, prompt.images, strict=True):
            target[:, : image.shape[1], : image.shape[2]] = image
        inputs = {"pixel_values": torch.from_numpy(padded), "image_sizes": torch.tensor(sizes)}
    with torch.inference_mode():
        logits: np.ndarray = reference(input_ids=ids, **inputs).logits[0].numpy()
    return logits
