"""Whether a job can be done, and with how many answers at a time, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pixtral_runtime.backends.device_buffers import whole_rows
from pixtral_runtime.batch.item_requests import Requests, outline
from pixtral_runtime.batch.records import Request
from pixtral_runtime.bundle.device_catalog import CPU_RESERVE_BYTES, KnownDevice
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.errors import ContextError, ImageError, MemoryShortageError, Option, Remedy, SettingError
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.conversation import Message, StoredPicture
from pixtral_runtime.inputs.image import stored_size
from pixtral_runtime.inputs.preprocess import token_count
from pixtral_runtime.inputs.prompt import PromptBuilder

MOST_SLOTS = 8  # taken by themselves; a CPU gains nothing beyond
MOST_DEVICE_SLOTS = 32
SHOWN_IMAGES = 3
SMALLER_IMAGES = Option("image_tokens", "N", "for smaller images")
SHARE_FOR_CACHES = 0.7  # of a device's free memory; the rest is for a prompt's chunk, images and the cache that grows


def check_fit(prompts: PromptBuilder, asked: Requests) -> None:
    """Refuse a job that cannot be done, before any work: raises ContextError.

    Each text must fit the context alone and with its images. Image headers are read only where the largest possible
    images would not fit; what cannot be read is left for the run to record. Of a stream only the first texts are
    judged: of its documents one may be too long, which its record then says.
    """
    context = prompts.bundle.limits.max_context
    requests = asked if isinstance(asked, Sequence) else [_without_images(request) for request in outline(asked)]
    for request, text in _with_text_tokens(prompts, requests):
        room = context - text - 1
        if len(request.images) * prompts.preprocess.largest_block <= room:
            continue
        sizes = [_size(image) for image in request.images]
        tokens = sum(token_count(*prompts.preprocess.grid(*size)) for size in sizes if size is not None)
        if tokens > room:
            raise ContextError(
                f"{_named(request.images)}: {tokens} tokens, the prompt {text}, and the bundle's "
                f"context holds {context}",
                Option("image_tokens", room // len(request.images), "for smaller images"),
                f"pixtral export … --max-context {text + tokens + 1}",
            )


def _named(images: Sequence[Path | StoredPicture]) -> str:
    """The first pictures by name; a document may have hundreds."""
    more = len(images) - SHOWN_IMAGES
    return ", ".join(map(str, images[:SHOWN_IMAGES])) + (f" and {more} more" if more > 0 else "")


def _size(image: Path | StoredPicture) -> tuple[int, int] | None:
    if isinstance(image, Path):
        return stored_size(image)
    try:
        return image.size()
    except ImageError:
        return None


def _without_images(request: Request) -> Request:
    return replace(request, messages=_texts_of(request))


def _texts_of(request: Request) -> tuple[Message, ...]:
    return tuple(replace(m, content=tuple(p for p in m.content if isinstance(p, str))) for m in request.messages)


def most_rows(prompts: PromptBuilder, requests: Sequence[Request]) -> int:
    """Cache rows that none of these requests exceeds, whatever sizes its images have."""
    block = prompts.preprocess.largest_block
    return max(
        text + len(request.images) * block + request.max_new_tokens
        for request, text in _with_text_tokens(prompts, requests)
    )


def _with_text_tokens(prompts: PromptBuilder, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
    """Each request with the tokens of its prompt without images."""
    texts: dict[tuple[Message, ...], int] = {}
    for request in requests:
        text = _texts_of(request)
        if text not in texts:
            texts[text] = len(prompts.build(text).token_ids)
        yield request, texts[text]


def choose_slots(model: Model, requests: Sequence[Request], wanted: int | None, memory_bytes: int | None) -> int:
    """How many answers of a job to work on at a time. Raises as `slots_for`."""
    return slots_for(model, _longest_context(model, requests), wanted, memory_bytes)


def slots_for(
    model: Model, context: int, wanted: int | None, memory_bytes: int | None, smaller: Remedy = SMALLER_IMAGES
) -> int:
    """How many answers of so many tokens, prompt included, to work on at a time.

    It is `wanted`, or as many as memory holds, engines were built for and pay. `memory_bytes` bounds what pixtral takes
    of this machine's memory; of a GPU's it takes what is free. Raises SettingError for none and for more than engines
    have, MemoryShortageError where the memory does not hold the answers' caches; `smaller` helps if not even one.
    """
    if wanted is not None and wanted < 1:
        raise SettingError(f"{wanted} answers at a time", Option("batch", "N", "from 1 on"))
    sessions, bundle = model.runner.sessions, model.bundle
    if sessions.slots is not None:
        if wanted is not None and wanted > sessions.slots:
            raise SettingError(
                f"{wanted} answers at a time were asked for, and this backend has {sessions.slots} slots",
                Option("batch", sessions.slots),
                f"pixtral build {bundle.path} --batch {wanted}",
            )
        return wanted or sessions.slots
    if sessions.free_bytes is not None:
        free = min(sessions.free_bytes, memory_bytes or sessions.free_bytes)
        slot = whole_rows(context, bundle.limits.max_context) * bundle.kv_cache_bytes_per_token
        return wanted or max(1, min(int(SHARE_FOR_CACHES * free) // slot, MOST_DEVICE_SLOTS))
    if memory_bytes is None:
        return wanted or MOST_SLOTS
    device = KnownDevice("this machine", memory_bytes, CPU_RESERVE_BYTES, 0)
    fitting = Footprint.of(bundle).largest_batch(device, context)
    if fitting < (wanted or 1):
        fewer = Option("batch", fitting) if fitting else smaller
        raise MemoryShortageError(
            f"{memory_bytes:,} bytes of memory hold {fitting} answers of {context} tokens each beside the model",
            fewer,
            *(() if fitting else (f"pixtral plan {bundle.path}",)),
        )
    return wanted or min(fitting, MOST_SLOTS)


def _longest_context(model: Model, requests: Sequence[Request]) -> int:
    """Tokens of the longest prompt and answer that these requests may have."""
    blocks = max((len(request.images) for request in requests), default=0) * model.prompts.preprocess.largest_block
    longest = max((request.max_new_tokens for request in requests), default=0)
    return min(blocks + longest + 512, model.bundle.limits.max_context)  # 512 of text
