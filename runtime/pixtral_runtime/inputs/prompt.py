"""From a conversation with images to what the model reads: token ids and pixels.

mistral-common writes the prompt (control tokens, system prompt in the last user message, image order: specification
section 3.2). It asks an image encoder for each image's tokens; ours answers with the preprocessing the user chose.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.bundle.integrity import check_file
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, Bundle, remake_hint
from pixtral_runtime.errors import BundleError, ContextError, InputError, Option, RequestError, extra_missing
from pixtral_runtime.inputs.conversation import Message, StoredPicture, ToolCall, check_tool_results
from pixtral_runtime.inputs.preprocess import KeptPixels, Preprocess, token_count
from pixtral_runtime.inputs.tool_calls import (
    CallingAnswer,
    CallTokens,
    mistral_calls,
    mistral_tools,
    model_id,
    read_calls,
)
from pixtral_runtime.inputs.tools import Tools

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

THINK_BLOCK = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)
FEW_BYTES = 4  # of a token; most have as many


@dataclass(frozen=True)
class Prompt:
    """What the model reads for one request."""

    token_ids: npt.NDArray[np.int64]  # (T,)
    feature_index: npt.NDArray[np.int64]  # (T,): which image feature stands here, -1 for text
    images: tuple[npt.NDArray[np.float32], ...]  # (3, H, W) each, in the order of the prompt
    image_tokens: int  # tokens of all image blocks, breaks and ends included

    @cached_property
    def image_keys(self) -> tuple[bytes, ...]:
        """A hash of each image's pixels."""
        return tuple(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in self.images)

    @cached_property
    def row_keys(self) -> npt.NDArray[np.int64]:
        """What each token's cache row depends on, beside the rows before it, (T,).

        A token id; for a patch of an image a negative number made from the image's hash and the patch's index.
        """
        keys = self.token_ids.copy()
        areas = [image.shape[1] * image.shape[2] for image in self.images]
        patch_area = sum(areas) // (self.feature_index.max() + 1) if areas else 1
        ends = np.cumsum(areas) // patch_area
        is_image = self.feature_index >= 0
        index = self.feature_index[is_image]
        seeds = np.array([int.from_bytes(key[:7]) << 6 for key in self.image_keys], np.int64)
        keys[is_image] = -1 - index - seeds[np.searchsorted(ends, index, side="right")] if areas else keys[is_image]
        return keys


class PromptBuilder:
    """Builds prompts for one bundle and one way of preprocessing."""

    def __init__(self, bundle: Bundle, preprocess: Preprocess) -> None:
        self.bundle = bundle
        self.preprocess = preprocess
        self.kept_pixels = KeptPixels()

    @cached_property
    def tokenizer(self) -> MistralTokenizer[Any, Any, Any, Any, Any]:
        """mistral-common's, with our images. Raises BundleError where the file is damaged."""
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        path = self.bundle.tokenizer_path
        name = self.bundle.tokenizer_name
        check_file(path, self.bundle.files[name], remake_hint(self.bundle.path), BundleError)
        if name == SENTENCEPIECE and find_spec("sentencepiece") is None:
            raise extra_missing("sentencepiece", "sentencepiece", "Pixtral-Large's tokenizer")
        try:
            tokenizer = MistralTokenizer.from_file(str(path))
        except Exception as error:  # it checks little, and fails in as many ways as there are wrong files
            raise BundleError(
                f"{path} is damaged: {type(error).__name__}: {error}", f"pixtral inspect {self.bundle.path} --verify"
            ) from error
        tokenizer.instruct_tokenizer.image_encoder = _image_encoder(self.bundle, self.preprocess, self.kept_pixels)
        return tokenizer

    def build(self, messages: Sequence[Message], max_new_tokens: int = 1, tools: Tools | None = None) -> Prompt:
        """Tokenize a conversation, and the tools that its answer may call.

        Raises InputError where it is malformed or does not fit the context.
        """
        from mistral_common.exceptions import InvalidAssistantMessageException, MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            size = sum(len(text.encode()) for text in _texts(messages, tools))
        except UnicodeEncodeError as error:  # the tokenizer would read something else
            raise RequestError(f"the prompt is not UTF-8 text: {error.reason}", "iconv -f latin1 -t utf-8") from error
        self._refuse_endless(size)
        check_tool_results(messages)
        try:
            request = ChatCompletionRequest(
                messages=[_to_mistral(message, self.think_tokens is not None) for message in messages],
                tools=None if tools is None else mistral_tools(tools),
            )
            tokenized = self.tokenizer.encode_chat_completion(request)
        except (MistralCommonException, ValueError, RecursionError) as error:
            is_both = isinstance(error, InvalidAssistantMessageException) and any(
                message.tool_calls and message.content for message in messages
            )
            raise RequestError(
                f"the conversation cannot be used: {error}",
                "leave away the text beside an assistant's tool calls" if is_both else "end it with a user message",
            ) from error
        ids = np.array(tokenized.tokens, np.int64)
        special = self.bundle.model.image_tokens
        is_image = ids == special.image
        images = tuple(np.asarray(image, np.float32) for image in tokenized.images)
        features = sum(image.shape[1] * image.shape[2] for image in images) // self.preprocess.patch_size**2
        if features != is_image.sum():
            raise InputError(f"{features} image patches for {is_image.sum()} [IMG] tokens", "report this as a bug")
        image_tokens = int(np.isin(ids, (special.image, special.image_break, special.image_end)).sum())
        context = self.bundle.limits.max_context
        if len(ids) + max_new_tokens > context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens ({image_tokens} of images), which leaves no room for "
                f"{max_new_tokens} new ones in the bundle's context of {context}",
                Option("image_tokens", "N", "for smaller images"),
                "a shorter prompt",
                f"pixtral export … --max-context {len(ids) + max_new_tokens}",
            )
        return Prompt(ids, np.where(is_image, is_image.cumsum() - 1, -1), images, image_tokens)

    def _refuse_endless(self, size_bytes: int) -> None:
        """Refuse a text that no tokenization fits into the context, before the minutes that it may take."""
        context = self.bundle.limits.max_context
        if size_bytes > context * FEW_BYTES and size_bytes > context * self._longest_token_bytes:
            raise ContextError(
                f"the prompt has {size_bytes:,} bytes of text, more than the bundle's context of {context} holds",
                "a shorter prompt",
            )

    @cached_property
    def _longest_token_bytes(self) -> int:
        tokens: Any = self.tokenizer.instruct_tokenizer.tokenizer  # the general type knows no bytes
        if self.bundle.tokenizer_name == SENTENCEPIECE:
            return max(len(piece.encode()) for piece in tokens.vocab())
        return max(len(tokens.id_to_byte_piece(id)) for id in range(tokens.num_special_tokens, tokens.n_words))

    @cached_property
    def think_tokens(self) -> tuple[int, int] | None:
        """The ids between which a reasoning model thinks before it answers; None where the tokenizer has none."""
        from mistral_common.tokens.tokenizers.base import SpecialTokens

        tokens: Any = self.tokenizer.instruct_tokenizer.tokenizer
        names = SpecialTokens.begin_think.value, SpecialTokens.end_think.value
        if not all(tokens.is_special(name) for name in names):
            return None
        opens, closes = map(tokens.get_special_token, names)
        return int(opens), int(closes)

    @cached_property
    def call_tokens(self) -> CallTokens:
        """The ids around calls of tools, which all tokenizers with pictures have."""
        from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion

        tokens: Any = self.tokenizer.instruct_tokenizer.tokenizer
        call = int(tokens.get_special_token(SpecialTokens.tool_calls.value))
        if tokens.version < TokenizerVersion.v11:
            return CallTokens(call)
        args, call_id = (tokens.get_special_token(name.value) for name in (SpecialTokens.args, SpecialTokens.call_id))
        return CallTokens(call, int(args), int(call_id) if tokens.version == TokenizerVersion.v11 else None)

    def read_answer(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Token ids of an answer to its text, and what was thought before it: None where there was no such block."""
        said, thought = self._told_apart(token_ids)
        return self.detokenize(said), None if thought is None else self.detokenize(thought)

    def thought_tokens(self, token_ids: Sequence[int]) -> int:
        """How many tokens of an answer were thought before it."""
        return len(self._told_apart(token_ids)[1] or ())

    def _told_apart(self, token_ids: Sequence[int]) -> tuple[list[int], list[int] | None]:
        """What is said, and what is thought."""
        said: list[int] = []
        thought: list[int] | None = None
        is_thinking = False
        for token in token_ids:
            if self.think_tokens is not None and token in self.think_tokens:
                is_thinking = token == self.think_tokens[0]
                thought = [] if is_thinking and thought is None else thought
            elif is_thinking and thought is not None:
                thought.append(token)
            else:
                said.append(token)
        return said, thought

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with nothing around it."""
        return [int(token) for token in self.tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)]

    def plain(self, token_ids: Sequence[int]) -> Prompt:
        """A text's tokens as the model reads a text that nobody asked: after <s>, with no question around it."""
        start = int(self.tokenizer.instruct_tokenizer.tokenizer.bos_id)
        ids = np.array([start, *token_ids], np.int64)
        return Prompt(ids, np.full(len(ids), -1), (), 0)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, control tokens by their names."""
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        tokens: Any = self.tokenizer.instruct_tokenizer.tokenizer
        if self.bundle.tokenizer_name == SENTENCEPIECE:
            return str(tokens.id_to_piece(token_id)).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return bytes(tokens.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP))

    def read_calling_answer(self, token_ids: Sequence[int]) -> CallingAnswer:
        """Token ids of an answer to its text and the calls of tools that follow it."""
        ids, call = list(token_ids), self.call_tokens.call
        place = ids.index(call) if call in ids else len(ids)
        text, thinking = self.read_answer(ids[:place])
        calls = () if place == len(ids) else self.read_calls(ids[place:])
        if calls is None:
            return CallingAnswer(text + self.detokenize(ids[place:]), thinking, (), is_malformed=True)
        return CallingAnswer(text, thinking, calls)

    def read_calls(self, token_ids: Sequence[int]) -> tuple[ToolCall, ...] | None:
        """The calls of tools that token ids from the first [TOOL_CALLS] on are; None where they are malformed."""
        return read_calls(token_ids, self.call_tokens, self.detokenize)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Token ids to text; control tokens vanish."""
        return str(self.tokenizer.decode(list(token_ids)))


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or of what a reasoning model thinks before it."""

    text: str
    is_thinking: bool = False


class TextStream:
    """Turns tokens into pieces of text as they come, holding back bytes of an unfinished character.

    Each is read behind the one before it: SentencePiece leaves the space away that a text begins with.
    """

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._before: list[int] = []
        self._pending: list[int] = []
        self._is_thinking = False

    def push(self, token_id: int) -> Piece:
        think = self._prompts.think_tokens
        if think is not None and token_id in think:
            rest = self.flush()
            self._is_thinking = token_id == think[0]
            return rest
        return Piece(self._text_with(token_id), self._is_thinking)

    def _text_with(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < 4:
            return ""
        # Behind bytes that are no character the next ones might be read as another number of them.
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        self._before, self._pending = self._pending if is_whole else [], []
        return text

    def flush(self) -> Piece:
        text = self._new_text()
        self._before, self._pending = [], []
        return Piece(text, self._is_thinking)

    def _new_text(self) -> str:
        known = self._prompts.detokenize(self._before)
        return self._prompts.detokenize([*self._before, *self._pending])[len(known) :]


def _texts(messages: Sequence[Message], tools: Tools | None) -> Iterator[str]:
    """All text of a prompt but control tokens."""
    for message in messages:
        yield from (part for part in message.content if isinstance(part, str))
        yield from (call.arguments for call in message.tool_calls)
    for tool in () if tools is None else tools.tools:
        yield from (tool.description, json.dumps(dict(tool.parameters), ensure_ascii=False))


def _to_mistral(message: Message, thinks: bool) -> Any:
    """`thinks` is whether a system prompt may show the model how to think, in a block that becomes its tokens."""
    from mistral_common.protocol.instruct import chunk, messages

    parts: list[Any] = []
    for part in message.content:
        if isinstance(part, Path | StoredPicture):
            raise InputError(f"{part} was not read", "open_image(path) reads it")
        if not isinstance(part, str | Image.Image):
            raise RequestError(f"{type(part).__name__} in a message", "texts, pictures, and paths of pictures")
        parts.append(chunk.TextChunk(text=part) if isinstance(part, str) else chunk.ImageChunk(image=part))
    if message.role == "user":
        return messages.UserMessage(content=parts)
    if message.role == "tool" and all(isinstance(part, str) for part in message.content):
        return messages.ToolMessage(content=parts, tool_call_id=model_id(message.tool_call_id or ""))
    text = "\n\n".join(part for part in message.content if isinstance(part, str))
    if len(parts) != sum(isinstance(part, str) for part in message.content):
        raise RequestError(f"a {message.role} message cannot hold an image", "put images into user messages")
    if message.role == "assistant":
        if message.tool_calls:
            return messages.AssistantMessage(content=text or None, tool_calls=mistral_calls(message.tool_calls))
        return messages.AssistantMessage(content=text)
    if not thinks or not (blocks := THINK_BLOCK.split(text))[1:]:
        return messages.SystemMessage(content=text)
    chunks = [chunk.ThinkChunk(thinking=b) if n % 2 else chunk.TextChunk(text=b) for n, b in enumerate(blocks)]
    return messages.SystemMessage(content=[one for one in chunks if one != chunk.TextChunk(text="")])


def _image_encoder(bundle: Bundle, preprocess: Preprocess, kept: KeptPixels) -> Any:
    """mistral-common's image encoder with our pixels and grid in the place of its own."""
    from mistral_common.tokens.tokenizers import image as mistral_image

    ids = bundle.model.image_tokens

    class Encoder(mistral_image.ImageEncoder):
        def __call__(self, content: Any) -> mistral_image.ImageEncoding:
            if (pixels := kept.get(content.image)) is None:
                pixels = preprocess.of(content.image)(content.image)
            columns, rows = (pixels.shape[axis] // preprocess.patch_size for axis in (2, 1))
            tokens = ([ids.image] * columns + [ids.image_break]) * rows
            tokens[-1] = ids.image_end
            assert len(tokens) == token_count(columns, rows)
            return mistral_image.ImageEncoding(tokens=tokens, image=pixels)

    config = mistral_image.ImageConfig(preprocess.patch_size, preprocess.max_side)
    return Encoder(config, mistral_image.SpecialImageIDs(ids.image, ids.image_break, ids.image_end))
