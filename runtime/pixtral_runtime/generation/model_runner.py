"""The model's forward passes: encode images, prefill a prompt in chunks, decode a step of one or several slots.

Backend-neutral: three sessions and a cache that the caller brings. `scheduler` makes answers of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.device_buffers import DeviceBuffer
from pixtral_runtime.backends.session import Array, Buffer, KVCache, Sessions
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.device.ranges import named_range
from pixtral_runtime.generation.logits import Logits
from pixtral_runtime.inputs.prompt import Prompt

LARGEST_INVERSE = 1e30  # of a temperature: below its own, only the best token has any weight


Features = Array | DeviceBuffer
"""Of one image, (P, D), or of a prompt's, (F, D): where the backend keeps them, or on the host."""


def on_host(features: Features) -> Array:
    return features.numpy() if isinstance(features, DeviceBuffer) else features


class ModelRunner:
    """Runs a bundle's graphs on NumPy arrays. Keeps nothing between calls."""

    def __init__(self, bundle: Bundle, sessions: Sessions) -> None:
        self._bundle = bundle
        self.sessions = sessions
        self.no_features = np.zeros((1, bundle.model.decoder.dim), bundle.dtype)

    def encode(self, images: Sequence[Array]) -> list[Features]:
        """Features (P, D) of each image, (3, H, W) float32. All must have one shape: they share a vision batch."""
        pixels = np.stack(images).astype(self._bundle.dtype)  # (B, 3, H, W)
        with named_range("vision"):
            features = self.sessions.vision.run({"pixels": pixels})["image_features"]
            if isinstance(features, DeviceBuffer):
                features.wait()  # so that whoever measures this stage measures it
        if isinstance(features, DeviceBuffer):
            return [features[index] for index in range(len(images))]
        return list(features.numpy())

    def join(self, features: Sequence[Features]) -> Features:
        """Features (F, D) of images in the order of a prompt; one row of zeros where there is no image."""
        if not features:
            return self.no_features
        there = [one for one in features if isinstance(one, DeviceBuffer)]
        if len(there) == len(features):
            return DeviceBuffer.join(there)
        return np.concatenate([on_host(one) for one in features])

    def encode_images(self, prompt: Prompt) -> Array:
        """Features of all images on the host, (F, D), as `join` orders them."""
        return on_host(self.join([self.encode([image])[0] for image in prompt.images]))

    def prefill(
        self, prompt: Prompt, features: Features, cache: KVCache, *, start: int = 0, all_logits: bool = False
    ) -> Array:
        """Fill a cache of one slot with the prompt from token `start` on; the rows before must be there already.

        Returns logits of its last token, (1, V), or of all tokens read, (T - start, V).
        """
        cache.reserve(len(prompt.token_ids) + 1)
        starts = range(start, len(prompt.token_ids), self.sessions.chunk)
        rows = []
        for first in starts:
            chunk = self.prefill_chunk(prompt, features, cache, first, all_logits=all_logits)
            if all_logits or first == starts[-1]:
                rows.append(chunk.numpy())
            del chunk  # the next one's logits may lie where these do
        return np.concatenate(rows)

    def prefill_chunk(
        self,
        prompt: Prompt,
        features: Features,
        cache: KVCache,
        start: int,
        *,
        all_logits: bool = False,
        temperature: float = 0.0,
    ) -> Logits:
        """One chunk of `prefill`: up to `Sessions.chunk` tokens; the cache must have the rows.

        `temperature` is what the next token is drawn at (`decode_slots`).
        """
        count = min(self.sessions.chunk, len(prompt.token_ids) - start)
        here = slice(start, start + count)
        wanted = np.arange(count) if all_logits else np.array([count - 1])
        chunk, local = self._features_of(prompt.feature_index[here], features)
        # What fills the chunk up comes after all that is wanted, and the next tokens are written over its rows.
        whole = self._rounded(count)
        fill = (0, whole - count if whole <= min(self.sessions.chunk, cache.rows - start) else 0)
        token_ids, local = np.pad(prompt.token_ids[here], fill)[None], np.pad(local, fill, constant_values=-1)[None]
        positions = np.arange(start, start + token_ids.shape[1])[None]
        temperatures = np.full(len(wanted), temperature)
        with named_range("prefill"):
            return self._step(token_ids, local, chunk, positions, wanted, temperatures, cache)

    def embed(self, prompt: Prompt, features: Features) -> Array:
        """What the decoder reads of a prompt's words and pictures, (T, D), on the host."""
        rows = []
        for start in range(0, len(prompt.token_ids), self.sessions.chunk):
            here = slice(start, start + self.sessions.chunk)
            chunk, local = self._features_of(prompt.feature_index[here], features)
            feeds = {"token_ids": prompt.token_ids[None, here], "image_features": chunk, "feature_index": local[None]}
            rows.append(self.sessions.embed.run(feeds)["hidden"].numpy()[0].copy())
        return np.concatenate(rows)

    def _features_of(self, index: Array, features: Features) -> tuple[Features, Array]:
        """The rows of features that a chunk's tokens take, and where each token finds its own; -1 for those of text.

        Only these travel, and neighbours up to a round number; a chunk of text sends one row, unused.
        """
        used = index[index >= 0]
        if not len(used):
            return features[:1], index
        first, count = int(used[0]), int(used[-1] + 1 - used[0])
        count = min(self._rounded(count), self.sessions.chunk, len(features))
        first = min(first, len(features) - count)
        return features[first : first + count], np.where(index >= 0, index - first, -1)

    def _rounded(self, count: int) -> int:
        """A number of tokens or features of a prompt, as the sessions like it."""
        step = self.sessions.prompt_step
        return -(-count // step) * step

    def decode_token(self, token: int, position: int, cache: KVCache) -> npt.NDArray[np.float32]:
        """Append one token at `position` to a cache of one slot. Returns the logits (V,) after it."""
        cache.reserve(position + 1)
        logits = self.decode_slots(np.array([[token]]), np.array([position]), np.zeros(1, np.int64), cache)
        return logits.numpy().reshape(-1)

    def decode_slots(
        self, token_ids: Array, starts: Array, wanted: Array, cache: KVCache, temperatures: Array | None = None
    ) -> Logits:
        """Append tokens (B, T) to each slot from row `starts` (B,) on; the cache must have the rows.

        `wanted` (R,) says after which tokens logits are wanted, counted over (B · T); `temperatures` (R,) what the next
        tokens are drawn at, for a backend that picks candidates. Returns logits (R, V).
        """
        tokens = token_ids.shape[1]
        positions = starts[:, None] + np.arange(tokens)  # (B, T)
        text = np.full(token_ids.shape, -1)
        heat = np.zeros(len(wanted)) if temperatures is None else temperatures
        with named_range("decode"):
            return self._step(token_ids, text, self.no_features, positions, wanted, heat, cache)

    def _step(
        self,
        token_ids: Array,
        feature_index: Array,
        features: Features,
        positions: Array,
        wanted: Array,
        temperatures: Array,
        cache: KVCache,
    ) -> Logits:
        embedded = self.sessions.embed.run(
            {"token_ids": token_ids, "image_features": features, "feature_index": feature_index}
        )
        feeds: dict[str, Array | Buffer] = {
            "hidden": embedded["hidden"],
            "position_ids": positions,
            "write_index": positions[:, 0],
            "logits_index": wanted,
        }
        if self.sessions.picks:
            drawn = temperatures > 1 / LARGEST_INVERSE
            inverse = np.divide(1, temperatures, out=np.full(len(wanted), LARGEST_INVERSE), where=drawn)
            feeds["inverse_temperature"] = inverse.astype(np.float32)
        decoded = self.sessions.decoder.run(feeds, cache)
        return Logits(decoded["logits"], decoded.get("picked"))
