"""From the bytes of a request to generations: JSON, pictures, tokens. In threads of its own, not in the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pixtral_runtime.errors import ContextError, PixtralError
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.json_schema import SchemaCache
from pixtral_runtime.generation.sampling import Constraint, Sampling, sampling_of
from pixtral_runtime.generation.tool_choice import compile_tools
from pixtral_runtime.inputs.openai_chat import ChatRequest, check_tokens, parse_chat
from pixtral_runtime.inputs.openai_messages import shown
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder
from pixtral_runtime.inputs.text_file import parsed_json
from pixtral_runtime.server.media import Media, remote_urls
from pixtral_runtime.server.problems import Problem, problem_of
from pixtral_runtime.server.remote_media import Fetcher

T = TypeVar("T")
THREADS = 2  # that decode pictures and tokenize
FETCH_THREADS = 8


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered."""

    request: ChatRequest
    prompt: Prompt
    generations: tuple[Generation, ...]


class Preparation:
    """Prepares requests for one bundle. `context` is the most tokens of a prompt and its answer."""

    def __init__(
        self, prompts: PromptBuilder, context: int, media: Media, fetcher: Fetcher, max_new_tokens: int | None = None
    ) -> None:
        """`max_new_tokens` is the longest answer of a request that says none: None for all that is left."""
        self._prompts, self._context, self._media, self._fetcher = prompts, context, media, fetcher
        self._max_new_tokens = max_new_tokens
        self._threads = ThreadPoolExecutor(THREADS, "prepare")
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        self._schemas = SchemaCache(prompts)

    def close(self) -> None:
        for pool in (self._threads, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def json(self, data: bytes) -> Any:
        """The value of a body. Raises Problem."""
        return await self._in_thread(_parsed, data)

    async def prepare(self, body: Any) -> Prepared:
        """A body of the chat API, read. Raises Problem."""
        fetched = await self._fetched(body) if self._media.is_remote_allowed else {}
        return await self._in_thread(self._prepare, body, fetched)

    async def tokens(self, body: Any) -> list[int]:
        """The token ids of a `prompt` of text, or of the `messages` of a body of the chat API. Raises Problem."""
        if not isinstance(body, dict) or "prompt" not in body:
            return [int(token) for token in (await self.prepare(body)).prompt.token_ids]
        if not isinstance(body["prompt"], str):
            raise Problem(400, f"prompt: expected a string, found {shown(body['prompt'])}", field="prompt")
        return await self._in_thread(self._prompts.encode, body["prompt"])

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except PixtralError as error:
            raise problem_of(error) from error

    async def _fetched(self, body: Any) -> dict[str, bytes]:
        urls = list(dict.fromkeys(remote_urls(body)))
        running = asyncio.get_running_loop()
        try:
            files = await asyncio.gather(
                *(running.run_in_executor(self._fetchers, self._fetcher.fetch, url) for url in urls)
            )
        except PixtralError as error:
            raise problem_of(error) from error
        return dict(zip(urls, files, strict=True))

    # In a thread

    def _prepare(self, body: Any, fetched: Mapping[str, bytes]) -> Prepared:
        request = parse_chat(body, lambda url, detail: self._media.open(url, detail, fetched))
        check_tokens(request.logit_bias, self._prompts.bundle.model.decoder.vocab_size)
        prompt = self._prompts.build(request.messages, tools=request.tools)
        _ = prompt.row_keys  # hashed here, where nobody waits
        room = self._context - len(prompt.token_ids)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(prompt.token_ids)} tokens ({prompt.image_tokens} of images), and prompt and "
                f"answer may have {self._context} together",
                "a shorter prompt, or fewer or smaller pictures",
            )
        limit = request.max_new_tokens or self._max_new_tokens or room
        drawn = sampling_of(self._prompts.bundle, request.temperature, request.top_p)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        schema = None if request.json_schema is None else self._schemas.compiled(request.json_schema)
        choice = None if request.tools is None else compile_tools(request.tools, self._prompts)
        may_call = request.tools is not None

        def constraint() -> Constraint | None:
            if choice is not None:
                return choice.constraint(schema)
            return None if schema is None else schema.constraint()

        generations = tuple(
            Generation(
                prompt,
                min(limit, room),
                Sampling(drawn.temperature, drawn.top_p, seed_of(seed, number)),
                constraint(),
                AnswerText(self._prompts, request.stops, may_call),
                request.logit_bias,
                request.top_logprobs,
            )
            for number in range(request.answers)
        )
        return Prepared(request, prompt, generations)


def seed_of(seed: int, number: int) -> int:
    """The seed of the answer of this number to one request: the first has the request's own."""
    if number == 0:
        return seed % 2**64
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8])


def _parsed(data: bytes) -> Any:
    try:
        return parsed_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON: {error}") from error
