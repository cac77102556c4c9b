"""Image features, encoded before a slot is free: images of one patch grid together, each image once.

Kept are the features that a request still needs and a few that were used last, as another question about the same
image may follow; with a `FeatureCache`, on disk as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import MemoryShortageError, PixtralError
from pixtral_runtime.generation.feature_cache import FeatureCache
from pixtral_runtime.generation.generation import Generation, StageTimes, milliseconds_since
from pixtral_runtime.generation.model_runner import Features, ModelRunner, on_host
from pixtral_runtime.inputs.prompt import Prompt

LARGE_ON_DEVICE = 4  # images; a GPU gains little beyond


class ImageFeatures:
    """Features by image content.

    `slots` is how many small images are encoded together, and how many features are kept that nothing needs.
    """

    def __init__(self, runner: ModelRunner, max_image_side_px: int, slots: int, disk: FeatureCache | None) -> None:
        self._runner, self._max_side_px, self._slots, self._disk = runner, max_image_side_px, slots, disk
        self._together = slots  # until memory runs out
        self._large_together = 1 if runner.sessions.free_bytes is None else LARGE_ON_DEVICE
        self._kept: dict[bytes, Features] = {}  # (P, D) by `Prompt.image_keys`, the newest last

    def has(self, prompt: Prompt) -> bool:
        """Whether all images of a prompt are encoded."""
        return all(key in self._kept for key in prompt.image_keys)

    def of(self, prompt: Prompt) -> Features:
        """Features of a prompt's images, (F, D), all of which are encoded; one row of zeros if there is no image."""
        return self._runner.join([self._kept[key] for key in prompt.image_keys])

    def encode_next(self, waiting: Sequence[Generation], total: StageTimes) -> list[Generation]:
        """Encode the first image that waits for it, with others of its grid.

        The time counts for the generations that wait for these images, and once in `total`. Returns the generations
        for which it failed, their errors set.
        """
        wanted: dict[bytes, Array] = {}
        owners: dict[Generation, None] = {}
        for generation in waiting:
            for key, image in zip(generation.prompt.image_keys, generation.prompt.images, strict=True):
                first = next(iter(wanted.values()), image)
                full = len(wanted) == self._most_together(first.shape)
                if key not in self._kept and key not in wanted and image.shape == first.shape and not full:
                    wanted[key] = image
                    owners[generation] = None
        started = time.perf_counter()
        try:
            self._kept |= self._encoded(wanted)
        except MemoryShortageError as error:
            if len(wanted) == 1:
                for generation in owners:
                    generation.fail(error)
                return list(owners)
            self._together = 1
            return []
        except PixtralError as error:
            for generation in owners:
                generation.fail(error)
            return list(owners)
        if owners:
            for times in (total, *(generation.times for generation in owners)):
                times.vision_ms += milliseconds_since(started)
        return []

    def forget(self, needed: Iterable[Prompt]) -> None:
        """Keep what these prompts need, and what was used last."""
        keys = {key for prompt in needed for key in prompt.image_keys}
        spare = [key for key in self._kept if key not in keys]
        for key in spare[: max(0, len(spare) - self._slots)]:
            del self._kept[key]

    def _encoded(self, images: dict[bytes, Array]) -> dict[bytes, Features]:
        """Features of images of one grid, from the disk where they are kept there."""
        found = {key: self._disk.get(key) for key in images} if self._disk is not None else {}
        features: dict[bytes, Features] = {key: value for key, value in found.items() if value is not None}
        missing = {key: image for key, image in images.items() if key not in features}
        if missing:
            features |= zip(missing, self._runner.encode(list(missing.values())), strict=True)
            if self._disk is not None:
                for key in missing:
                    self._disk.put(key, on_host(features[key]))
        return features

    def _most_together(self, shape: tuple[int, ...]) -> int:
        """Images (3, H, W) of a shape that are encoded together: few large ones, whose attention takes the memory."""
        is_large = max(shape[1:]) > self._max_side_px // 2
        return min(self._together, self._large_together) if is_large else self._together
