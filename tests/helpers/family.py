"""Tiny models of the shapes of configuration that members of Pixtral's family have (specification section 4)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from helpers.tiny import tiny_config
from pixtral_runtime.bundle.config import ModelConfig, QueryScale, Yarn
from pixtral_runtime.bundle.manifest import Bundle, FileEntry
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

_TINY = tiny_config()
_MISTRAL_3 = replace(
    _TINY,
    vision=replace(_TINY.vision, patch_size=14, image_size=252, spatial_merge_size=2),
    adapter_bias=False,
    adapter_norm=True,
)
ORIGINAL_LENGTH = 24  # tokens: prompts are several times as long
_STRETCHED = replace(
    _TINY.decoder,
    rope_theta=1e6,
    yarn=Yarn(64.0, ORIGINAL_LENGTH),
    query_scale=QueryScale(0.1, ORIGINAL_LENGTH),
    max_position=1024,
)
MEMBERS: dict[str, ModelConfig] = {
    "Pixtral-Large": replace(_TINY, adapter_bias=False, decoder=replace(_TINY.decoder, n_heads=6, dim=128)),
    "Mistral-Small-3.1": _MISTRAL_3,
    "Ministral-3-8B": replace(_MISTRAL_3, decoder=_STRETCHED),
    "Ministral-3-3B": replace(_MISTRAL_3, decoder=replace(_STRETCHED, tied_embeddings=True)),
}

NEWER_TOKENS = (
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]",
)  # fmt: skip
FIRST_NEWER = 17  # rank, of the first 20 of which version 3 has unnamed ones


def set_tokenizer_version(path: Path, version: str) -> None:
    """Give a tekken.json another version, which from 7 on lists its special tokens by rank."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["config"]["version"] = version
    if version != "v3":
        count = data["config"]["default_num_special_tokens"]
        names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
        names += [f"<SPECIAL_{rank}>" for rank in range(len(names), count)]
        names[FIRST_NEWER : FIRST_NEWER + len(NEWER_TOKENS)] = NEWER_TOKENS
        data["special_tokens"] = [
            {"rank": rank, "token_str": str(name), "is_control": True} for rank, name in enumerate(names[:count])
        ]
    path.write_text(json.dumps(data), encoding="utf-8")


def prompts_of_version(bundle: Bundle, folder: Path, version: str) -> PromptBuilder:
    """A bundle's prompts with another version of its tokenizer, which is then `folder / "tekken.json"`."""
    path = folder / "tekken.json"
    shutil.copy(bundle.tokenizer_path, path)
    set_tokenizer_version(path, version)
    entry = FileEntry(path.stat().st_size, sha256_of_file(path))
    copied = replace(bundle, path=folder, files=bundle.files | {path.name: entry})
    return PromptBuilder(copied, default_preprocess(copied))
