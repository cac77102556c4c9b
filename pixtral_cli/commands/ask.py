"""`pixtral ask`: one answer over one or more images, printed while it is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
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
    PromptOption,
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

EPILOG = "Example: pixtral ask bundle before.jpg after.jpg -p 'What changed?'"


def ask(
    context: typer.Context,
    bundle: BundleArgument,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, in the order the prompt means them; none is fine.")
    ] = None,
    prompt: PromptOption = "Describe this image in one short sentence.",
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
    """Ask one question about images, and see the answer as it comes."""
    from dataclasses import asdict
    from itertools import groupby

    from pixtral_runtime.inputs.conversation import user_message
    from pixtral_runtime.inputs.image_files import open_image

    if not images:
        refuse_unused(context, ("max_image_side", "image_tokens", "preprocess", "exif"), "without an image")
    refuse_unused_by_backend(context, backend)
    prompts = open_prompts(bundle, preprocess, max_image_side, image_tokens)
    sampling = read_sampling(prompts.bundle, temperature, top_p, seed)
    pictures = [open_image(path, apply_exif=exif) for path in images or []]
    built = prompts.build(user_message(read_prompt(prompt), pictures, system))
    model = open_model(prompts, backend, threads)
    warn_of_unused(context, model.backend)
    if as_json:
        answer = asdict(model.answer(built, max_new_tokens, sampling))
        if answer["thinking"] is None:
            del answer["thinking"]
        setting = {"preprocess": preprocess, "exif_applied": exif, "bundle": prompts.bundle.fingerprint}
        setting |= {"sampling": asdict(sampling)}
        output.print_json(answer | setting)
        return
    stream = model.answer_stream(built, max_new_tokens, sampling)
    for is_thinking, pieces in groupby(stream, key=lambda piece: piece.is_thinking):
        for piece in pieces:
            if is_thinking:
                output.think(piece.text)
            else:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        if is_thinking:
            output.think("\n")
    sys.stdout.write("\n")
