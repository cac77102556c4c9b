"""Where a parameter stands in each checkpoint format, and how its bytes differ from the graph's.

Canonical names are Mistral's, but for the merging of patches, which is the adapter's. Two things differ between
formats: names, and the row order of wq and wk, which Mistral stores as adjacent rotary pairs and Hugging Face as two
halves (specification section 1.5). Graphs use the halves.
"""

from __future__ import annotations

import re

from torch import Tensor

_DECODER_LAYER = (
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
)
_VISION_LAYER = (
    *((mistral, hf.replace("self_attn.", "attention.").replace("mlp.", "feed_forward."))
      for mistral, hf in _DECODER_LAYER[:7]),
)  # fmt: skip
_VISION_PREFIX = "vision_encoder."


_MISTRAL = {
    "vision_language_adapter.norm.weight": "pre_mm_projector_norm.weight",
    "vision_language_adapter.merging_layer.weight": "patch_merger.merging_layer.weight",
}


def mistral_name(name: str) -> str:
    """A canonical name as Mistral's files spell it."""
    return _MISTRAL.get(name, name)


def hf_name(name: str) -> str:
    """A canonical name as Hugging Face Llava files spell it (old family: `language_model.model.…`)."""
    if name.startswith(_VISION_PREFIX):
        return _replace(name.replace(_VISION_PREFIX, "vision_tower.", 1), _VISION_LAYER)
    if name.startswith("vision_language_adapter."):
        name = name.replace("vision_language_adapter", "multi_modal_projector")
        name = name.replace("merging_layer", "patch_merger.merging_layer")
        return name.replace("w_in", "linear_1").replace("w_out", "linear_2")
    if name == "output.weight":
        return "language_model.lm_head.weight"
    name = name.replace("tok_embeddings", "embed_tokens")
    return "language_model.model." + _replace(name, _DECODER_LAYER)


def hf_new_name(name: str) -> str:
    """A canonical name in the spelling of transformers 5: `model.language_model.…`, `lm_head.weight`."""
    old = hf_name(name)
    if old == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + old.replace("language_model.model.", "language_model.", 1)


def _replace(name: str, table: tuple[tuple[str, str], ...]) -> str:
    match = re.fullmatch(r"(.*layers\.\d+\.)(.+)(\.weight)", name)
    if match is None:
        return name
    return match[1] + dict(table).get(match[2], match[2]) + match[3]


def pairs_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Mistral's wq or wk rows to rotate-half order: row (h, 2j + half) becomes row (h, j + half·E/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `pairs_to_halves`."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
