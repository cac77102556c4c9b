"""A GGUF of random weights in llama.cpp's Q4_0: linears in Q4_0, embedding and head in Q8_0.

Runs in the interpreter that has the package gguf, which has no pixtral: NumPy and the standard library only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 32  # weights that share a float16 scale in Q4_0 and Q8_0
CONTEXT = 4096  # tokens


@dataclass(frozen=True)
class Shapes:
    """A decoder, by the names of `pixtral_runtime.bundle.config.DecoderConfig`."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF. `std` is the deviation its values shall have."""

    name: str
    shape: tuple[int, ...]
    type: str  # F32, Q4_0 or Q8_0
    std: float

    @property
    def nbytes(self) -> int:
        per_block = {"F32": 4 * BLOCK, "Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK}[self.type]
        return math.prod(self.shape) // BLOCK * per_block

    def random(self, rng: np.random.Generator) -> npt.NDArray[Any]:
        """Ones where it is a norm, else blocks of a scale and random codes: uint8, (rows, bytes of a row)."""
        if self.type == "F32":
            return np.ones(self.shape, np.float32)
        values = np.frombuffer(rng.bytes(self.nbytes), np.uint8).reshape(math.prod(self.shape) // BLOCK, -1).copy()
        codes = {"Q4_0": 16, "Q8_0": 256}[self.type]  # uniform ones deviate by their number over the root of 12
        values[:, :2] = np.array([self.std * math.sqrt(12) / codes], "<f2").view(np.uint8)
        return values.reshape(self.shape[0], -1)


def tensors(shapes: Shapes) -> Iterator[Tensor]:
    """llama.cpp's tensors of architecture "llama"; deviations keep activations near 1 through any depth."""
    queries, keys = shapes.n_heads * shapes.head_dim, shapes.n_kv_heads * shapes.head_dim
    depth = math.sqrt(2 * shapes.n_layers)
    yield Tensor("token_embd.weight", (shapes.vocab_size, shapes.dim), "Q8_0", 1.0)
    for layer in range(shapes.n_layers):
        for name, rows, columns, damping in (
            ("attn_q", queries, shapes.dim, 1.0),
            ("attn_k", keys, shapes.dim, 1.0),
            ("attn_v", keys, shapes.dim, 1.0),
            ("attn_output", shapes.dim, queries, depth),
            ("ffn_gate", shapes.hidden_dim, shapes.dim, 1.0),
            ("ffn_up", shapes.hidden_dim, shapes.dim, 1.0),
            ("ffn_down", shapes.dim, shapes.hidden_dim, depth),
        ):
            yield Tensor(f"blk.{layer}.{name}.weight", (rows, columns), "Q4_0", columns**-0.5 / damping)
        for name in ("attn_norm", "ffn_norm"):
            yield Tensor(f"blk.{layer}.{name}.weight", (shapes.dim,), "F32", 0.0)
    yield Tensor("output_norm.weight", (shapes.dim,), "F32", 0.0)
    yield Tensor("output.weight", (shapes.vocab_size, shapes.dim), "Q8_0", shapes.dim**-0.5)


def write_gguf(path: Path, shapes: Shapes, seed: int = 0) -> None:
    """Stream a model of random weights: memory stays at one tensor. Needs the package gguf."""
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shapes.n_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shapes.dim)
    writer.add_feed_forward_length(shapes.hidden_dim)
    writer.add_head_count(shapes.n_heads)
    writer.add_head_count_kv(shapes.n_kv_heads)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(shapes.rope_theta)
    writer.add_layer_norm_rms_eps(shapes.norm_eps)
    writer.add_vocab_size(shapes.vocab_size)
    writer.add_tokenizer_model("none")  # token ids only
    for tensor in tensors(shapes):
        kind = gguf.GGMLQuantizationType[tensor.type]
        if tensor.type == "F32":
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        else:
            row = (tensor.shape[0], tensor.nbytes // tensor.shape[0])
            writer.add_tensor_info(tensor.name, row, np.dtype(np.uint8), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for tensor in tensors(shapes):
        writer.write_tensor_data(tensor.random(rng))
    writer.close()
