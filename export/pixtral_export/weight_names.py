"""What tensors of the weight file are called and where they lie: shared by graphs, recipes and the file's writer."""

from __future__ import annotations

from dataclasses import dataclass

VISION_ROPE = ("vision_rope.cos", "vision_rope.sin")
DECODER_ROPE = ("decoder_rope.cos", "decoder_rope.sin")
QUERY_ROPE = ("decoder_rope.query_cos", "decoder_rope.query_sin")  # where queries are scaled by their position


@dataclass(frozen=True)
class ExternalWeight:
    """Where an initializer's bytes lie in the weight file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def scale_name(name: str) -> str:
    return f"{name}_scale"


def global_scale_name(name: str) -> str:
    return f"{name}_global_scale"


def input_scale_name(name: str) -> str:
    """The static scale of a layer's input; wq, wk and wv read one input and share one scale, as do w1 and w3."""
    layer = name.removesuffix(".weight")
    shared = layer.endswith(("wq", "wk", "wv", "w1", "w3"))
    return f"{layer.rpartition('.')[0] if shared else layer}.input_scale"
