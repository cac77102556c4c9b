"""The contract between export, engines and runtime: each graph's tensors, as data.

Export takes its input names and dynamic axes from here, engines their profiles, sessions their bindings. A dimension is
a number, or a letter where it changes from call to call:

    B slots (decoder) or images (vision)      T new tokens        C cache rows of a slot
    F image features                          R rows with logits  P patches
    H, W image height and width in pixels, multiples of the patch size
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtral_runtime.bundle.config import ModelConfig

ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")
GRAPHS = ("vision", "embed", "decoder")

PREFILL_CHUNK_TOKENS = 256  # tokens; bounds the attention scores to chunk × context per head
CUDA_CHUNK_TOKENS = 2048  # of ONNX Runtime's CUDA, whose attention holds no scores and which widens int4 once a chunk


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int | str, ...]
    dtype: str


CachePairs = tuple[tuple[TensorSpec, TensorSpec], ...]
"""Each cache tensor that a graph reads (past), with the output that replaces it (present)."""


@dataclass(frozen=True)
class GraphSpec:
    """`caches` are inputs and outputs as well: key and value of layer 0, of layer 1, …"""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: CachePairs = ()


def vision_graph(config: ModelConfig, dtype: str) -> GraphSpec:
    """Images of one patch grid to decoder-sized features, patches in row-major order."""
    return GraphSpec(
        "vision",
        inputs=(TensorSpec("pixels", ("B", config.vision.num_channels, "H", "W"), dtype),),
        outputs=(TensorSpec("image_features", ("B", "P", config.decoder.dim), dtype),),
    )


def embed_graph(config: ModelConfig, dtype: str) -> GraphSpec:
    """Token ids to hidden states, with image features where `feature_index` is not negative."""
    return GraphSpec(
        "embed",
        inputs=(
            TensorSpec("token_ids", ("B", "T"), "int64"),
            TensorSpec("image_features", ("F", config.decoder.dim), dtype),
            TensorSpec("feature_index", ("B", "T"), "int64"),
        ),
        outputs=(TensorSpec("hidden", ("B", "T", config.decoder.dim), dtype),),
    )


def decoder_graph(config: ModelConfig, dtype: str, cache_dtype: str) -> GraphSpec:
    """Hidden states to logits. Each present tensor is its past tensor with T rows written from `write_index` on."""
    decoder = config.decoder
    shape = ("B", decoder.n_kv_heads, "C", decoder.head_dim)
    past, present = (
        tuple(TensorSpec(name, shape, cache_dtype) for name in cache_names(when, decoder.n_layers))
        for when in ("past", "present")
    )
    return GraphSpec(
        "decoder",
        inputs=(
            TensorSpec("hidden", ("B", "T", decoder.dim), dtype),
            TensorSpec("position_ids", ("B", "T"), "int64"),
            TensorSpec("write_index", ("B",), "int64"),
            TensorSpec("logits_index", ("R",), "int64"),
            *past,
        ),
        outputs=(TensorSpec("logits", ("R", decoder.vocab_size), "float32"), *present),
        caches=tuple(zip(past, present, strict=True)),
    )


def cache_names(when: str, layers: int) -> tuple[str, ...]:
    """Names of the cache tensors, `when` being past or present: key and value of layer 0, of layer 1, …"""
    return tuple(f"{when}_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value"))


def graph_spec(name: str, config: ModelConfig, dtype: str, cache_dtype: str | None = None) -> GraphSpec:
    """The graph called `name`, for activations of `dtype` and a KV cache of `cache_dtype` (None: the same)."""
    if name == "decoder":
        return decoder_graph(config, dtype, cache_dtype or dtype)
    return {"vision": vision_graph, "embed": embed_graph}[name](config, dtype)


def kv_cache_bytes_per_token(config: ModelConfig, cache_dtype: str) -> int:
    """Keys and values of one token in all layers."""
    decoder = config.decoder
    itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[cache_dtype]
    return 2 * decoder.n_layers * decoder.n_kv_heads * decoder.head_dim * itemsize
