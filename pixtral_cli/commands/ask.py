"""`pixtral ask`: an answer over one or more images, or a conversation about them, printed while it is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import chat, output
from pixtral_cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    ExifOption,
    ImageTokensOption,
    JsonOption,
    MaxImageSideOption,
    MaxNewTokensOption,
    PreprocessOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopPOption,
    open_model,
    open_prompts,
    read_prompt,
    read_sampling,
    refuse_unused,
    refuse_unused_by_backend,
    warn_of_unused,
)
from pixtral_cli.typed_lines import piped_messages
from pixtral_runtime.errors import InputError

EPILOG = "Example: pixtral ask bundle before.jpg after.jpg -p 'What changed?'"
DEFAULT_PROMPT = "Describe this image in one short sentence."


def ask(
    context: typer.Context,
    bundle: BundleArgument,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, in the order the prompt means them; none is fine.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            help="What to ask; @FILE reads it from a file. Without it: a conversation, typed or read from standard "
            "input line by line; where there is neither, a description.",
        ),
    ] = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    max_image_side: MaxImageSideOption = None,
    image_tokens: ImageTokensOption = None,
    preprocess: PreprocessOption = "mistral",
    exif: ExifOption = True,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask about images, once or in a conversation; answers stream."""
    from dataclasses import asdict

    from pixtral_runtime.generation.conversation import Conversation
    from pixtral_runtime.inputs.conversation import user_message
    from pixtral_runtime.inputs.image_files import open_image

    is_typed = prompt is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    lines = piped_messages() if prompt is None and not sys.stdin.isatty() else iter(())
    piped = _from_first_question(lines)
    is_conversation = is_typed or (piped is not None and not as_json)
    if not images and not is_conversation:
        refuse_unused(context, ("max_image_side", "image_tokens", "preprocess", "exif"), "without an image")
    refuse_unused_by_backend(context, backend)
    if prompt is None and piped is None and not images and not is_typed:
        raise InputError("there is no question and no image", "-p 'your question'")
    prompts = open_prompts(bundle, preprocess, max_image_side, image_tokens)
    sampling = read_sampling(prompts.bundle, temperature, top_p, seed)
    pictures = [open_image(path, apply_exif=exif) for path in images or []]
    if is_conversation:
        model = open_model(prompts, backend, threads)
        warn_of_unused(context, model.backend)
        conversation = Conversation(model, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
        shown = [(picture, str(path)) for picture, path in zip(pictures, images or [], strict=True)]
        chat.talk(conversation, shown, exif, piped, DEFAULT_PROMPT)
        return
    text = "\n".join(piped or [DEFAULT_PROMPT]) if prompt is None else read_prompt(prompt)
    built = prompts.build(user_message(text, pictures, system))
    model = open_model(prompts, backend, threads)
    warn_of_unused(context, model.backend)
    if as_json:
        answer = asdict(model.answer(built, max_new_tokens, sampling))
        del answer["reused_tokens"]
        if answer["thinking"] is None:
            del answer["thinking"]
        setting = {"preprocess": preprocess, "exif_applied": exif, "bundle": prompts.bundle.fingerprint}
        setting |= {"sampling": asdict(sampling)}
        output.print_json(answer | setting)
        return
    chat.show_answer(model.answer_stream(built, max_new_tokens, sampling))


def _from_first_question(messages: Iterator[str]) -> Iterator[str] | None:
    """The messages from the first on that says something; None where none does."""
    first = next((message for message in messages if message.strip()), None)
    return None if first is None else chain((first,), messages)
