"""A model reads an answer that it need not have given: teacher forcing, by which two models' predictions compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import Array, KVCache
from pixtral_runtime.errors import BundleError
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.prompt import Prompt


def forced_pass(model: Model, prompt: Prompt, tokens: Sequence[int]) -> tuple[Array, npt.NDArray[np.float32], KVCache]:
    """Read the prompt, then `tokens` one by one, whatever the model would have said itself.

    Returns image features (F, D), the prediction of each token (n, V), and the cache without the last token, which is
    predicted and never read. Raises BundleError on NaN.
    """
    runner, length = model.runner, len(prompt.token_ids)
    cache = runner.sessions.decoder.new_cache(slots=1, rows=length + len(tokens) - 1)
    features = runner.encode_images(prompt)
    rows = [runner.prefill(prompt, features, cache)[-1]]
    rows += [runner.decode_token(token, length + n, cache) for n, token in enumerate(tokens[:-1])]
    logits = np.stack(rows).astype(np.float32)
    if not np.isfinite(logits).all():
        raise BundleError(
            f"{model.bundle.path} computes logits that are not numbers, so they cannot be compared",
            f"pixtral export CHECKPOINT -o {model.bundle.path} --force --dtype float32",
        )
    return features, logits, cache
