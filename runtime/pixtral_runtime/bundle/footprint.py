"""Whether a bundle fits on a device: bytes of weights, KV cache and activations, known before anything runs.

Weights and cache are exact. Activations are the widest moment of a stage, every tensor of it counted as if nothing were
reused, so they err on the safe side. What system, driver and libraries keep (`reserved_bytes`) is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.device_catalog import LEAST_CAPABILITY, NOT_ON_CPU, NOT_ON_GPU, KnownDevice
from pixtral_runtime.bundle.manifest import WEIGHTS, Bundle, Limits
from pixtral_runtime.bundle.spec import (
    ACTIVATION_DTYPES,
    CUDA_CHUNK_TOKENS,
    PREFILL_CHUNK_TOKENS,
    kv_cache_bytes_per_token,
)
from pixtral_runtime.errors import Option, Remedy

CPU_WEIGHT_FACTOR = 1.4  # ONNX Runtime packs matrices while the file is mapped; 1.36 seen for the 12B in int4
CODES_PER_SCALE = 128  # of embeddings and head in int8
LEAST_CONTEXT_TOKENS = 1024  # tokens; a shorter one is no advice


@dataclass(frozen=True)
class Footprint:
    """What a bundle takes, made or planned. `weights` has the bytes of each precision it could have been made in."""

    model: ModelConfig
    dtype: str
    precision: str
    limits: Limits
    weights: Mapping[str, int]
    cache_bytes_per_token: int

    @classmethod
    def of(cls, bundle: Bundle) -> Footprint:
        weights = {bundle.precision: bundle.files[WEIGHTS].bytes}
        per_token = bundle.kv_cache_bytes_per_token
        return cls(bundle.model, bundle.dtype, bundle.precision, bundle.limits, weights, per_token)

    def loaded_bytes(self, precision: str | None = None) -> int:
        """Of the weights in engines, or in ONNX Runtime's memory on a GPU."""
        return self.weights[precision or self.precision] + self._head_of_embeddings(precision or self.precision)

    def weight_bytes(self, device: KnownDevice, precision: str | None = None) -> int:
        size = self.loaded_bytes(precision)
        return size if device.capability else round(size * CPU_WEIGHT_FACTOR)

    def _head_of_embeddings(self, precision: str) -> int:
        """Bytes of a head that the file holds as the embeddings only; a device has it beside them, turned around."""
        if not self.model.decoder.tied_embeddings:
            return 0
        values, wide = self.model.decoder.vocab_size * self.model.decoder.dim, 4 if self.dtype == "float32" else 2
        return values * wide if precision in ACTIVATION_DTYPES else values + values * wide // CODES_PER_SCALE

    def cache_bytes(self, context: int, batch: int) -> int:
        return batch * context * self.cache_bytes_per_token

    def activation_bytes(self, device: KnownDevice, context: int, batch: int = 1) -> int:
        """The larger of encoding images and prefilling one chunk of a prompt: engines compute in one memory.

        Images are one of the largest size, and engines take a batch of half its side as well. A GPU's attention is
        fused; ONNX Runtime's on a CPU has the scores of all heads in memory, in float32. On a card what ONNX Runtime
        takes is counted, which is more than engines do: longer chunks, and the widest product's int4 weights in
        float16.
        """
        vision, decoder = self.model.vision, self.model.decoder
        chunk = min(CUDA_CHUNK_TOKENS if device.is_card else PREFILL_CHUNK_TOKENS, context)
        wide = 4 if self.dtype == "float32" or self.precision in ("int8", "fp8") else 2  # Q/DQ works in float32
        side = self.limits.max_image_side // vision.patch_size
        patches = max(side**2, batch * (side // 2) ** 2 if device.is_board else 0)
        encode = patches * (6 * vision.hidden_size + 3 * vision.intermediate_size + 2 * decoder.dim) * wide
        heads = (decoder.n_heads + 2 * decoder.n_kv_heads) * decoder.head_dim
        prefill = chunk * (4 * decoder.dim + 3 * decoder.hidden_dim + 2 * heads) * wide + 4 * decoder.vocab_size
        if device.is_board:  # engines: a mask, and one layer's keys and values for each query head
            prefill += chunk * context + 2 * decoder.n_heads * decoder.head_dim * context * 2
        elif not device.is_card:
            prefill += decoder.n_heads // decoder.n_kv_heads * chunk * context  # the mask
        elif self.precision == "int4":
            prefill += 2 * decoder.hidden_dim * decoder.dim * wide
        if device.capability == 0:
            encode += 4 * vision.num_attention_heads * patches**2
            prefill += 4 * decoder.n_heads * chunk * context
        return max(encode, prefill)

    def needed_bytes(self, device: KnownDevice, context: int, batch: int) -> int:
        """All of it, without what the device keeps for itself."""
        cache = self.cache_bytes(context, batch)
        return self.weight_bytes(device) + cache + self.activation_bytes(device, context, batch)

    def fits(self, device: KnownDevice, context: int, batch: int) -> bool:
        return device.reserved_bytes + self.needed_bytes(device, context, batch) <= device.memory_bytes

    def largest_batch(self, device: KnownDevice, context: int) -> int:
        """Slots of `context` tokens that fit; 0 where the model does not."""
        return _largest(
            lambda batch: self.fits(device, context, batch), device.memory_bytes // self.cache_bytes(context, 1)
        )

    def largest_context(self, device: KnownDevice, batch: int) -> int:
        """Tokens a slot may have with `batch` slots, at most the model's positions; 0 where none fits."""
        return _largest(lambda context: self.fits(device, context, batch), self.model.decoder.max_position)

    @property
    def has_codes_cached(self) -> bool:
        return self.cache_bytes_per_token < kv_cache_bytes_per_token(self.model, self.dtype)

    def supported(self, device: KnownDevice, precision: str | None = None) -> bool:
        """Whether the device computes in the precision's types. Boards run engines, which have no cache of codes."""
        if device.is_board and self.has_codes_cached:
            return False
        names = {precision or self.precision, self.dtype}
        if device.capability == 0:
            return names.isdisjoint(NOT_ON_CPU)
        return self.dtype != NOT_ON_GPU and all(device.capability >= LEAST_CAPABILITY.get(name, 0) for name in names)

    def advice(self, device: KnownDevice, context: int, batch: int) -> tuple[Remedy, ...]:
        """What to change, all of it, where it does not fit; empty where it does."""
        if device.capability and self.dtype == NOT_ON_GPU:
            return (Option("dtype", "float16"),)
        if device.is_board and self.has_codes_cached:
            return (f"a cache in {self.dtype}",)
        if self.supported(device):
            if self.fits(device, context, batch):
                return ()
            if batch > 1 and (fewer := self.largest_batch(device, context)):
                return (Option("batch", fewer),)
            if (shorter := self.largest_context(device, 1)) >= LEAST_CONTEXT_TOKENS:
                return Option("context", shorter // 256 * 256), Option("batch", 1)
        for precision in sorted(self.weights, key=lambda name: -self.weights[name]):
            smaller = self.weight_bytes(device, precision) - self.weight_bytes(device)
            spare = device.memory_bytes - device.reserved_bytes - self.needed_bytes(device, LEAST_CONTEXT_TOKENS, 1)
            if precision != self.precision and self.supported(device, precision) and smaller <= spare:
                return (Option("precision", precision),)
        return ("a device with more memory" if self.supported(device) else f"a device with {self.precision}",)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do; 0 where none fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
