"""Every parameter of a model by its canonical name, Mistral's, with its shape in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pixtral_runtime.bundle.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """A tensor every checkpoint must have. `rotary_heads` is nonzero where rows are ordered for rotary embedding."""

    name: str
    shape: tuple[int, ...]  # as stored in a checkpoint: linear weights (out, in)
    rotary_heads: int = 0
    copy_of: str = ""  # the parameter whose tensor this one is too, in a checkpoint that stores it once

    @property
    def is_linear(self) -> bool:
        """Whether the graph holds the transpose, (in, out)."""
        return len(self.shape) == 2 and self.name != "tok_embeddings.weight"


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of a model, in the order in which a bundle stores them."""
    vision, decoder = config.vision, config.decoder
    patch = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
    yield Parameter("vision_encoder.patch_conv.weight", patch)
    yield Parameter("vision_encoder.ln_pre.weight", (vision.hidden_size,))
    for n in range(vision.num_hidden_layers):
        heads = vision.num_attention_heads
        yield from _block(
            f"vision_encoder.transformer.layers.{n}",
            vision.hidden_size, vision.intermediate_size, heads, heads, vision.head_dim,
        )  # fmt: skip
    if config.adapter_norm:
        yield Parameter("vision_language_adapter.norm.weight", (vision.hidden_size,))
    if vision.spatial_merge_size > 1:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        yield Parameter("vision_language_adapter.merging_layer.weight", (vision.hidden_size, merged))
    for name, width in (("w_in", vision.hidden_size), ("w_out", decoder.dim)):
        yield Parameter(f"vision_language_adapter.{name}.weight", (decoder.dim, width))
        if config.adapter_bias:
            yield Parameter(f"vision_language_adapter.{name}.bias", (decoder.dim,))
    yield Parameter("tok_embeddings.weight", (decoder.vocab_size, decoder.dim))
    for n in range(decoder.n_layers):
        yield from _block(
            f"layers.{n}", decoder.dim, decoder.hidden_dim, decoder.n_heads, decoder.n_kv_heads, decoder.head_dim
        )
    yield Parameter("norm.weight", (decoder.dim,))
    table = "tok_embeddings.weight" if decoder.tied_embeddings else ""
    yield Parameter("output.weight", (decoder.vocab_size, decoder.dim), copy_of=table)


def _block(prefix: str, dim: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}.attention.wq.weight", (heads * head_dim, dim), rotary_heads=heads)
    yield Parameter(f"{prefix}.attention.wk.weight", (kv_heads * head_dim, dim), rotary_heads=kv_heads)
    yield Parameter(f"{prefix}.attention.wv.weight", (kv_heads * head_dim, dim))
    yield Parameter(f"{prefix}.attention.wo.weight", (dim, heads * head_dim))
    yield Parameter(f"{prefix}.feed_forward.w1.weight", (hidden, dim))
    yield Parameter(f"{prefix}.feed_forward.w2.weight", (dim, hidden))
    yield Parameter(f"{prefix}.feed_forward.w3.weight", (hidden, dim))
    yield Parameter(f"{prefix}.attention_norm.weight", (dim,))
    yield Parameter(f"{prefix}.ffn_norm.weight", (dim,))
