"""The model's configuration: sizes, token ids and constants of Pixtral's three parts.

The field names are those of Mistral's `params.json`. A checkpoint reader fills these classes, `bundle.json` stores
them, and every other module reads sizes from here. Source: specification section 1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LARGEST = 2**40  # of sizes and constants: what is larger, no model has


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: a transformer over square patches, with 2-D rotary positions."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    patch_size: int
    image_size: int  # the longest edge, in pixels, that the encoder was trained on
    rope_theta: float
    num_channels: int = 3
    norm_eps: float = 1e-5
    hidden_act: str = "silu"  # or gelu, the exact one, where an export was asked to keep it
    spatial_merge_size: int = 1  # patches along each edge of the square that becomes one token

    @property
    def max_grid(self) -> int:
        """Patches along the longest edge."""
        return self.image_size // self.patch_size

    @property
    def token_edge(self) -> int:
        """Pixels along each edge of what becomes one token."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies for positions far beyond `original_max_position`, which a model saw first (section 4.4)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    @property
    def max_position(self) -> int:
        """Positions that it was made for."""
        return round(self.factor * self.original_max_position)


@dataclass(frozen=True)
class QueryScale:
    """Queries grow by 1 + beta · ln(1 + floor(position / length)) (section 4.4)."""

    beta: float
    length: int


@dataclass(frozen=True)
class DecoderConfig:
    """The language model: a pre-norm transformer with grouped-query attention and gated SiLU feed-forward."""

    dim: int
    n_layers: int
    head_dim: int  # explicit: 128 in Pixtral-12B, where dim / n_heads would be 160
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    rope_theta: float
    norm_eps: float = 1e-5
    max_position: int = 131_072
    hidden_act: str = "silu"
    yarn: Yarn | None = None
    query_scale: QueryScale | None = None
    tied_embeddings: bool = False  # the output head is the table of token embeddings


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the tokens that stand for an image in a prompt (specification section 1.4)."""

    image: int = 10
    image_break: int = 12
    image_end: int = 13


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `bos` and `eos` are the vocabulary's ids, tekken's and SentencePiece's alike."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_tokens: ImageTokens = ImageTokens()
    adapter_bias: bool = True
    adapter_norm: bool = False  # before patches are merged
    bos: int = 1
    eos: int = 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: ModelConfig) -> dict[str, tuple[object, object]]:
        """Fields that two models do not share, by dotted name, with this one's value and the other's."""
        ours, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        names = dict.fromkeys((*ours, *theirs))  # a part that is not there has no fields
        return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}

    def faults(self) -> list[str]:
        """What no model of this kind can have, and shapes cannot show: sizes, how heads are grouped, token ids."""
        decoder, vision, tokens = self.decoder, self.vision, self.image_tokens
        sizes = [*asdict(vision).items(), *asdict(decoder).items()]
        sizes += [item for part in (decoder.yarn, decoder.query_scale) if part for item in asdict(part).items()]
        numbers = [(k, v) for k, v in sizes if isinstance(v, int | float) and not isinstance(v, bool)]
        if wrong := [f"{k} is {v}" for k, v in numbers if not 0 < v <= LARGEST]:
            return wrong
        ids = (tokens.image, tokens.image_break, tokens.image_end)
        right = {
            f"{decoder.n_heads} query heads cannot share {decoder.n_kv_heads} kv heads evenly": (
                decoder.n_heads % decoder.n_kv_heads == 0
            ),
            f"head_dim {decoder.head_dim} is odd": decoder.head_dim % 2 == 0,
            f"rope_theta {decoder.rope_theta} is not above 1, as YaRN needs it": (
                decoder.yarn is None or decoder.rope_theta > 1
            ),
            f"the vision encoder's head_dim {vision.head_dim} is no multiple of 4": vision.head_dim % 4 == 0,
            f"image_size {vision.image_size} is less than patch_size {vision.patch_size}": vision.max_grid > 0,
            f"image token ids {ids} are not three different ones": len(set(ids)) == len(ids),
            f"image token ids {ids} are not all below vocab_size {decoder.vocab_size}": (
                min(ids) >= 0 and max(ids) < decoder.vocab_size
            ),
            f"bos {self.bos} and eos {self.eos} are not both below vocab_size {decoder.vocab_size}": (
                min(self.bos, self.eos) >= 0 and max(self.bos, self.eos) < decoder.vocab_size
            ),
        }
        return [fault for fault, holds in right.items() if not holds]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
