"""A checkpoint's tokenizer file: does mistral-common take it, and does it go with the configuration?"""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, SUPPORTED_MODEL, read_json
from pixtral_runtime.bundle.config import ImageTokens, ModelConfig
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, TOKENIZER
from pixtral_runtime.errors import CheckpointError, extra_missing

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer
    from mistral_common.tokens.tokenizers.image import ImageConfig
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

SENTENCEPIECE_START = "tokenizer.model"  # of names; Pixtral-Large's file is another's with these letters behind it
PACKAGED_TOKENIZER = "tekken_240911.json"  # Pixtral-12B's own file, part of every mistral-common release
PACKAGED_VOCABULARY = 131_072


@dataclass(frozen=True)
class TokenizerFile:
    """A tekken.json, or Pixtral-Large's SentencePiece model, that can be used."""

    path: Path
    image: ImageConfig | None = None  # patch and longest side, where the checkpoint's own file names them
    warnings: tuple[str, ...] = ()
    image_tokens: ImageTokens | None = None  # where they are not the configuration's


def find_tokenizer(folder: Path, config: ModelConfig, names: Collection[str] = ()) -> TokenizerFile:
    """The tokenizer of a checkpoint, or mistral-common's copy. Raises CheckpointError where none fits.

    `names` are the checkpoint's files, some of which may be elsewhere.
    """
    path = folder / TOKENIZER
    vocabulary = config.decoder.vocab_size
    if not path.is_file() and (folder / SENTENCEPIECE).is_file():
        return _sentencepiece(folder / SENTENCEPIECE, config)
    if not path.is_file():
        path = Path(str(importlib.resources.files("mistral_common").joinpath("data", PACKAGED_TOKENIZER)))
        if other := sorted(name for name in names if name.startswith(SENTENCEPIECE_START)):
            raise CheckpointError(
                f"{folder} has a SentencePiece tokenizer without pictures ({other[0]}); "
                f"read are {TOKENIZER} and Pixtral-Large's {SENTENCEPIECE}",
                f"put the {SENTENCEPIECE} of mistralai/Pixtral-Large-Instruct-2411 into {folder}, or use "
                f"{SUPPORTED_MODEL}",
            )
        if vocabulary != PACKAGED_VOCABULARY or not path.is_file():
            raise CheckpointError(
                f"{folder} has no {TOKENIZER}, and none is known for a vocabulary of {vocabulary} tokens",
                f"put the model's {TOKENIZER} into {folder}",
            )
        message = f"{folder} has no {TOKENIZER}; mistral-common's copy of Pixtral-12B's is used ({PACKAGED_TOKENIZER})"
        return TokenizerFile(path, warnings=(message,))
    header = read_json(path).get("config")
    size = header.get("default_vocab_size") if isinstance(header, dict) else None
    if not isinstance(size, int):
        raise CheckpointError(f"{path} has no config.default_vocab_size: it is no tekken tokenizer", DOWNLOAD_HINT)
    _check_size(path, size, vocabulary)
    special = header.get("default_num_special_tokens") if isinstance(header, dict) else None
    if not isinstance(special, int) or not 0 < special < size:  # mistral-common makes as many, whatever it says
        raise CheckpointError(f"{path} has {special} special tokens among {size}", DOWNLOAD_HINT)
    tekken = cast("Tekkenizer", _opened(path, config.image_tokens))
    _check_ids(path, tekken, config)
    return TokenizerFile(path, tekken.image)


def _sentencepiece(path: Path, config: ModelConfig) -> TokenizerFile:
    """A SentencePiece model, whose name says which pictures it is for."""
    if find_spec("sentencepiece") is None:
        raise extra_missing("sentencepiece", "sentencepiece", "Pixtral-Large's tokenizer")
    from mistral_common.tokens.tokenizers.sentencepiece import get_image_config

    tokens = _opened(path, config.image_tokens)
    _check_size(path, tokens.n_words, config.decoder.vocab_size)
    if config.image_tokens != ImageTokens():
        _check_ids(path, tokens, config)
        return TokenizerFile(path, get_image_config(path))
    # Those of tekken, which a configuration that leaves them out is taken to mean.
    ids = ImageTokens(*(tokens.get_special_token(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")))
    _check_ids(path, tokens, replace(config, image_tokens=ids))
    warning = (
        f"image_break_token_id and image_end_token_id are {ids.image_break} and {ids.image_end}, as {path.name} says"
    )
    return TokenizerFile(path, get_image_config(path), (warning,), ids)


def _check_size(path: Path, size: int, vocabulary: int) -> None:
    if size > vocabulary:
        raise CheckpointError(
            f"{path} has {size} tokens, the model only {vocabulary}: they do not belong together",
            f"put the {path.name} that came with the weights into {path.parent}",
        )


def _opened(path: Path, ids: ImageTokens) -> Tokenizer:
    """The tokenizer as mistral-common reads it, after a prompt with an image: what fails there would fail at each."""
    from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    special = SpecialImageIDs(ids.image, ids.image_break, ids.image_end)
    message = UserMessage(content=[TextChunk(text="a"), ImageChunk(image=Image.new("RGB", (1, 1)))])
    try:
        tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.from_file(str(path))
        tokenizer.instruct_tokenizer.image_encoder = ImageEncoder(ImageConfig(1, 1), special)
        tokenizer.decode(tokenizer.encode_chat_completion(ChatCompletionRequest(messages=[message])).tokens)
    except Exception as error:  # its checks raise assertions, look-ups, whatever they meet
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise CheckpointError(
            f"{path} is no tokenizer that mistral-common can use: {type(error).__name__}: {reason}",
            f"put the {path.name} that came with the weights into {path.parent}",
        ) from error
    tokens: Tokenizer = tokenizer.instruct_tokenizer.tokenizer
    return tokens


def _check_ids(path: Path, tokens: Tokenizer, config: ModelConfig) -> None:
    """Image tokens other than the model's would be answered without a look at the image, another end without one."""
    expected = config.image_tokens
    names = {"[IMG]": expected.image, "[IMG_BREAK]": expected.image_break, "[IMG_END]": expected.image_end}
    seen = tuple(tokens.get_special_token(name) if tokens.is_special(name) else -1 for name in names)
    if seen != tuple(names.values()):
        raise CheckpointError(
            f"{path} gives {', '.join(names)} the ids {', '.join(map(str, seen))}; "
            f"the model's configuration {', '.join(map(str, names.values()))}",
            f"put the {path.name} that came with the weights into {path.parent}, or name the ids in its configuration",
        )
    if (tokens.bos_id, tokens.eos_id) != (config.bos, config.eos):
        raise CheckpointError(
            f"{path} gives <s>, </s> the ids {tokens.bos_id}, {tokens.eos_id}, expected {config.bos}, {config.eos}",
            f"put the {path.name} that came with the weights into {path.parent}",
        )
