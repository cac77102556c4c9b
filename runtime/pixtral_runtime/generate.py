"""The model's work for one request: encode images, prefill the prompt in chunks, decode token by token.

Backend-neutral: three sessions and a cache. One request at a time, in slot 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pixtral_runtime.bundle import Bundle
from pixtral_runtime.prompt import Prompt
from pixtral_runtime.sampling import Sampler, Sampling
from pixtral_runtime.session import Array, Buffer, KVCache, Session

PREFILL_CHUNK = 256  # tokens; bounds the attention scores to chunk × context per head


@dataclass
class StageTimes:
    """Where a request's time went."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


@dataclass(frozen=True)
class Sessions:
    """A bundle's graphs, ready to run. `chunk` is how many tokens of a prompt they take at a time."""

    vision: Session
    embed: Session
    decoder: Session
    chunk: int = field(default=PREFILL_CHUNK, kw_only=True)


class Generator:
    """Generates token ids for prompts. Keeps one cache and reuses it from request to request."""

    def __init__(self, bundle: Bundle, sessions: Sessions) -> None:
        self._bundle = bundle
        self.sessions = sessions
        self._no_features = np.zeros((1, bundle.model.decoder.dim), bundle.dtype)
        self._text = np.array([[-1]], np.int64)
        self._cache: KVCache | None = None

    def stream(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling, times: StageTimes) -> Iterator[int]:
        """Yield up to `max_new_tokens` token ids, the end-of-sequence token last where the model says it."""
        started = time.perf_counter()
        features = self.encode_images(prompt)
        times.vision_ms = _ms_since(started)
        started = time.perf_counter()
        length = len(prompt.token_ids)
        if self._cache is None:
            self._cache = self.sessions.decoder.new_cache(slots=1, rows=length + 1)
        logits = self.prefill(prompt, features, self._cache)[-1]
        sampler = Sampler(sampling)
        times.prefill_ms = _ms_since(started)
        for position in range(length, length + max_new_tokens):
            token = sampler(logits)
            yield token
            if token == self._bundle.model.eos or position + 1 == length + max_new_tokens:
                return
            started = time.perf_counter()
            logits = self.decode(token, position, self._cache)
            times.decode_ms += _ms_since(started)
            times.decode_steps += 1

    def encode_images(self, prompt: Prompt) -> Array:
        """Features of all images, (F, D), in the order of the prompt; one row of zeros where there is no image."""
        if not prompt.images:
            return self._no_features
        runs = [self.sessions.vision.run({"pixels": image[None].astype(self._bundle.dtype)}) for image in prompt.images]
        return np.concatenate([run["image_features"].numpy()[0] for run in runs])

    def prefill(self, prompt: Prompt, features: Array, cache: KVCache, *, all_logits: bool = False) -> Array:
        """Fill the cache with the prompt. Returns logits (1, V) of its last token, or (T, V) of all of them."""
        length = len(prompt.token_ids)
        cache.reserve(length + 1)
        rows: list[Array] = []
        for start in range(0, length, self.sessions.chunk):
            positions = np.arange(start, min(start + self.sessions.chunk, length))
            index = prompt.feature_index[positions]
            wanted = np.arange(len(positions)) if all_logits else np.array([len(positions) - 1])
            # Only the features of this chunk travel; a text-only chunk sends one row, unused.
            used = index[index >= 0]
            chunk = features[used[0] : used[-1] + 1] if len(used) else features[:1]
            local = np.where(index >= 0, index - used[0], -1) if len(used) else index
            logits = self._step(prompt.token_ids[positions][None], local[None], chunk, positions[None], wanted, cache)
            rows = [*rows, logits.numpy()] if all_logits else [logits.numpy()]
        return np.concatenate(rows)

    def decode(self, token: int, position: int, cache: KVCache) -> npt.NDArray[np.float32]:
        """Append one token at `position`. Returns the logits (V,) after it."""
        cache.reserve(position + 1)
        ids, positions = np.array([[token]], np.int64), np.array([[position]], np.int64)
        logits = self._step(ids, self._text, self._no_features, positions, np.zeros(1, np.int64), cache).numpy()
        return np.asarray(logits[0], np.float32)

    def _step(
        self, token_ids: Array, feature_index: Array, features: Array, positions: Array, wanted: Array, cache: KVCache
    ) -> Buffer:
        embedded = self.sessions.embed.run(
            {"token_ids": token_ids, "image_features": features, "feature_index": feature_index}
        )
        decoded = self.sessions.decoder.run(
            {
                "hidden": embedded["hidden"],
                "position_ids": positions,
                "write_index": positions[:, 0],
                "logits_index": wanted,
            },
            cache,
        )
        return decoded["logits"]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
