"""How fast a stage could be at best: the bytes it must move, the operations it must do, and what a device has for both.

    costs = stage_costs(bundle, grid=(64, 64), prompt_tokens=4224, context_rows=4352, batch=8)
    best = ceiling(costs["decode"], measure_bandwidth(threads).max, measure_matrix_rate(threads, "int4").max)

Costs are what no implementation can do without: every weight once a pass, every cache row once a step, only the causal
half of attention, logits of the last token only. A runtime that does more (reads weights once a chunk of the prompt,
computes masked scores, copies) shows it as a smaller share of the ceiling. Norms, activations, softmax and rotary
turns are left out: a few thousandths of the operations. docs/roofline.md explains it.

Shapes: B batch, T tokens, P patches, C cache rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, VisionConfig
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import graph_weight_bytes
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import Option, SettingError


@dataclass(frozen=True)
class Sizes:
    """What costs depend on besides the work. `weights` has the bytes of each graph's weights, no rotary tables."""

    model: ModelConfig
    weights: Mapping[str, int]
    cache_bytes_per_token: int
    activation_bytes: int  # of one number

    @classmethod
    def of(cls, bundle: Bundle) -> Sizes:
        """Read from the bundle's graphs. Raises InputError where one cannot be read."""
        weights = {graph: graph_weight_bytes(bundle, graph) for graph in GRAPHS}
        return cls(bundle.model, weights, bundle.kv_cache_bytes_per_token, 4 if bundle.dtype == "float32" else 2)


@dataclass(frozen=True)
class Cost:
    """What one pass of a stage takes at least. `activation_bytes` are the graph's inputs and outputs."""

    matrix_flops: int = 0  # of products with weights; a multiplication and an addition are two
    attention_flops: int = 0  # of products of activations, which no recipe quantizes
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    def times(self, passes: int) -> Cost:
        """Of several passes, one after the other."""
        return Cost(**{name: passes * value for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Ceiling:
    """The least time of a pass: the longer of moving its bytes and doing its operations, as if they overlapped."""

    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound_by(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"


def stage_costs(
    source: Bundle | Sizes,
    *,
    grid: tuple[int, int] | None = None,
    image_side: int | None = None,
    prompt_tokens: int,
    context_rows: int,
    batch: int = 1,
) -> dict[str, Cost]:
    """Costs of one pass of each stage, by its name.

    vision: `batch` images of one `grid` (rows, columns of patches) or of `image_side` pixels; neither: no image.
    embed and prefill: one prompt of `prompt_tokens`, into an empty cache.
    decode: a token for each of `batch` slots that have `context_rows` rows with it.

    Raises SettingError where a size makes no sense.
    """
    sizes = Sizes.of(source) if isinstance(source, Bundle) else source
    if grid is not None and image_side is not None:
        raise SettingError("grid and image_side name the same thing", "one of the two")
    if image_side is not None:
        grid = (-(-image_side // sizes.model.vision.token_edge),) * 2
    if prompt_tokens < 1 or context_rows < 1 or batch < 1 or min(grid or (1,)) < 1:
        raise SettingError("grid, prompt tokens, context rows and batch are 1 or more", Option("prompt_tokens", 128))
    return {
        "vision": _vision(sizes, grid, batch) if grid else Cost(),
        "embed": _embed(sizes, grid or (0, 0), prompt_tokens),
        "prefill": _prefill(sizes, prompt_tokens),
        "decode": _decode(sizes, context_rows, batch),
    }


def ceiling(
    cost: Cost, bandwidth_bytes_per_s: float, matrix_flops_per_s: float, attention_flops_per_s: float | None = None
) -> Ceiling:
    """The least time of a pass on a device. `attention_flops_per_s`, where recipes make matrices faster than that."""
    attention = cost.attention_flops / (attention_flops_per_s or matrix_flops_per_s)
    return Ceiling(cost.bytes / bandwidth_bytes_per_s, cost.matrix_flops / matrix_flops_per_s + attention)


def _vision(sizes: Sizes, grid: tuple[int, int], images: int) -> Cost:
    vision, dim = sizes.model.vision, sizes.model.decoder.dim
    merged = vision.spatial_merge_size**2
    tokens, area = grid[0] * grid[1], vision.num_channels * vision.patch_size**2
    patches = tokens * merged
    per_patch = area * vision.hidden_size + vision.num_hidden_layers * _vision_layer(vision)
    per_token = vision.hidden_size * dim + dim * dim  # adapter
    if merged > 1:
        per_token += merged * vision.hidden_size**2
    width = vision.num_attention_heads * vision.head_dim
    return Cost(
        matrix_flops=2 * images * (patches * per_patch + tokens * per_token),
        attention_flops=4 * images * vision.num_hidden_layers * width * patches**2,  # every patch sees every patch
        weight_bytes=sizes.weights["vision"],
        activation_bytes=images * (patches * area + tokens * dim) * sizes.activation_bytes,
    )


def _embed(sizes: Sizes, grid: tuple[int, int], tokens: int) -> Cost:
    """A row of the table or of the features each, gathered."""
    decoder = sizes.model.decoder
    return Cost(
        weight_bytes=tokens * sizes.weights["embed"] // decoder.vocab_size,
        activation_bytes=(tokens + grid[0] * grid[1]) * decoder.dim * sizes.activation_bytes,
    )


def _prefill(sizes: Sizes, tokens: int) -> Cost:
    decoder = sizes.model.decoder
    return Cost(
        matrix_flops=2 * (tokens * decoder.n_layers * _decoder_layer(decoder) + decoder.dim * decoder.vocab_size),
        attention_flops=_attention(decoder, tokens * (tokens + 1) // 2),
        weight_bytes=sizes.weights["decoder"],
        cache_bytes=tokens * sizes.cache_bytes_per_token,  # written
        activation_bytes=tokens * decoder.dim * sizes.activation_bytes + 4 * decoder.vocab_size,
    )


def _decode(sizes: Sizes, rows: int, slots: int) -> Cost:
    decoder = sizes.model.decoder
    return Cost(
        matrix_flops=2 * slots * (decoder.n_layers * _decoder_layer(decoder) + decoder.dim * decoder.vocab_size),
        attention_flops=_attention(decoder, slots * rows),
        weight_bytes=sizes.weights["decoder"],
        cache_bytes=slots * rows * sizes.cache_bytes_per_token,  # all but the newest read, that one written
        activation_bytes=slots * (decoder.dim * sizes.activation_bytes + 4 * decoder.vocab_size),
    )


def _attention(decoder: DecoderConfig, pairs: int) -> int:
    """Scores and weighted sums of that many pairs of a token and a row it sees, in all heads and layers."""
    return 4 * decoder.n_layers * decoder.n_heads * decoder.head_dim * pairs


def _vision_layer(vision: VisionConfig) -> int:
    """Numbers in a block's matrices."""
    width = vision.num_attention_heads * vision.head_dim
    return vision.hidden_size * (4 * width + 3 * vision.intermediate_size)


def _decoder_layer(decoder: DecoderConfig) -> int:
    """Numbers in a block's matrices."""
    width = (2 * decoder.n_heads + 2 * decoder.n_kv_heads) * decoder.head_dim
    return decoder.dim * (width + 3 * decoder.hidden_dim)
