"""What calibration reads: prompts with the user's images, or the packaged ones.

A folder gives images, asked the packaged questions in turn. A JSON Lines file gives an object a line: `prompt`, and
`image` (a path, relative to the file) or `images` (several) or neither. Images are scaled to `MOST_IMAGE_TOKENS`:
what activations look like hardly depends on resolution, and twice as many tokens take twice as long.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.errors import ImageError, InputError, Option
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import collect_images, open_image
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder
from pixtral_runtime.inputs.text_file import parsed_json, read_lines

DEFAULT_SAMPLES = 16
MOST_IMAGE_TOKENS = 256
PACKAGED = Path(__file__).parent / "samples"
PACKAGED_QUESTIONS = (
    "Describe this image in one short sentence.",
    "Describe this image in detail.",
    "What text can be read in this image? Write it down word for word.",
    "List every object in this image with its color and position.",
    "What is unusual about this image? Explain step by step.",
)
PACKAGED_TEXTS = (
    "Write a short letter to a neighbour about a borrowed ladder, polite but firm.",
    "Explain how a bill becomes a law, in five sentences.",
    "def median(values):\n    values = sorted(values)\nComplete this Python function and explain it.",
    "Übersetze ins Englische: Der Zug nach München fährt heute zwanzig Minuten später ab.",
)


@dataclass(frozen=True)
class CalibrationRequest:
    """One sample before it is tokenized."""

    prompt: str
    images: tuple[Path, ...] = ()


def packaged_requests() -> list[CalibrationRequest]:
    """The packaged images, each with a question of its own, and prompts without image in between."""
    images = sorted(path for path in PACKAGED.iterdir() if path.suffix != ".md")
    asked = [
        CalibrationRequest(PACKAGED_QUESTIONS[n % len(PACKAGED_QUESTIONS)], (image,)) for n, image in enumerate(images)
    ]
    spoken = [CalibrationRequest(text) for text in PACKAGED_TEXTS]
    again = [
        CalibrationRequest(PACKAGED_QUESTIONS[(n + 2) % len(PACKAGED_QUESTIONS)], (image,))
        for n, image in enumerate(images[::2])
    ]
    return asked + spoken + again


def calibration_requests(source: Path) -> list[CalibrationRequest]:
    """The samples of a folder or a JSON Lines file. Raises InputError."""
    if os.path.isdir(source):
        images = collect_images([str(source)], (), recursive=True)
        return [
            CalibrationRequest(PACKAGED_QUESTIONS[n % len(PACKAGED_QUESTIONS)], (image,))
            for n, image in enumerate(images)
        ]
    lines = read_lines(source, Option("calibration", ("FOLDER", "FILE.jsonl")))
    return [_request(source, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _request(source: Path, number: int, line: str) -> CalibrationRequest:
    try:
        entry = parsed_json(line)
        images = entry.get("images", [entry["image"]] if "image" in entry else [])
        if not isinstance(entry["prompt"], str) or not all(isinstance(image, str) for image in images):
            raise TypeError("prompt and image must be text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{source}, line {number}: {error}; expected an object with 'prompt' and 'image'",
            '{"image": "photo.jpg", "prompt": "What is shown?"}',
        ) from error
    return CalibrationRequest(entry["prompt"], tuple(source.parent / image for image in images))


def build_samples(
    requests: Sequence[CalibrationRequest], prompts: PromptBuilder, count: int
) -> tuple[list[Prompt], list[str]]:
    """Tokenize `count` requests spread evenly over all. Returns them, and why others in their place were left out.

    Raises InputError where no sample with an image is left.
    """
    built: list[Prompt] = []
    refused: list[str] = []
    for request in _spread(requests, count):
        if len(built) == count:
            break
        try:
            pictures = [open_image(path) for path in request.images]
        except ImageError as error:
            refused.append(str(error))
            continue
        built.append(prompts.build(user_message(request.prompt, pictures)))
    if not any(prompt.images for prompt in built):
        reason = f"; {refused[0]}" if refused else ""
        raise InputError(
            f"none of the {len(requests)} calibration samples has a readable image{reason}",
            Option("calibration", "FOLDER", "with images like those the model will see"),
        )
    return built, refused


def _spread(requests: Sequence[CalibrationRequest], count: int) -> Iterator[CalibrationRequest]:
    """First `count` requests at even distances, then the others, to stand in for broken ones."""
    chosen = [n * len(requests) // count for n in range(count)] if len(requests) > count else range(len(requests))
    yield from (requests[n] for n in chosen)
    taken = set(chosen)
    yield from (request for n, request in enumerate(requests) if n not in taken)


def samples_fingerprint(samples: Iterable[Prompt]) -> str:
    """One hash for tokens and pixels, 16 hex digits."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.token_ids.tobytes())
        for image in sample.images:
            digest.update(image.tobytes())
    return digest.hexdigest()[:16]
