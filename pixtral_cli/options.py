"""Arguments that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_runtime.batch.item_requests import Requests
    from pixtral_runtime.batch.job import Job
    from pixtral_runtime.batch.results_file import ResultsFile
    from pixtral_runtime.batch.worker import Worker
    from pixtral_runtime.bundle.manifest import Bundle
    from pixtral_runtime.generation.model import Model
    from pixtral_runtime.generation.sampling import Sampling
    from pixtral_runtime.inputs.prompt import PromptBuilder

STDIN = STDOUT = Path("-")


def output_file(text: str) -> Path:
    """A file to write, as it was typed. Raises InputError for what is plainly none."""
    from pixtral_runtime.errors import InputError

    if text.endswith("/") or not Path(text).name:  # of the empty text and of a dot there is none
        raise InputError(f"{text or '.'} is a folder", f"{text}NAME for a file in it")
    if text == str(STDOUT):
        raise InputError("standard output is no place for it", "the name of a file")
    return Path(text)


def output_file_or_stdout(text: str) -> Path:
    """As `output_file`; `-` is standard output."""
    return STDOUT if text == str(STDOUT) else output_file(text)


BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder, made by 'pixtral export'.")]


def use_gpu(index: int | None) -> int | None:
    """A callback: before anything opens a GPU."""
    if index is not None:
        from pixtral_runtime.backends.cuda import use_gpu

        use_gpu(index)
    return index


PromptOption = Annotated[str, typer.Option("-p", "--prompt", help="What to ask; @FILE reads it from a file.")]
SystemOption = Annotated[str | None, typer.Option(help="System prompt.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
TemperatureOption = Annotated[
    float | None, typer.Option(help="0 is greedy, higher more random. Default: the checkpoint's, or 0.")
]
TopPOption = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens of this total. Default: the checkpoint's, or 0.8.")
]
SeedOption = Annotated[int, typer.Option(help="With --temperature: seed of the draws.")]
MaxImageSideOption = Annotated[int | None, typer.Option(help="Scale images down to this longest edge in pixels.")]
ImageTokensOption = Annotated[
    int | None, typer.Option(help="Scale each image down until it takes at most this many tokens.")
]
TokenBudgetsOption = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,full",
        help="Scale each image down until it takes at most N tokens. Several, the score for each: 256,1024,full.",
    ),
]
PreprocessOption = Annotated[str, typer.Option(help="Whose image preprocessing: mistral or hf.")]
ExifOption = Annotated[bool, typer.Option("--exif/--no-exif", help="Turn pictures as their EXIF orientation says.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads of ONNX Runtime; 0 takes all cores.")]
BackendOption = Annotated[
    str, typer.Option(help="auto (engines for this GPU where the bundle has them), ort-cpu, ort-cuda, rtx or trt.")
]
BatchOption = Annotated[
    str, typer.Option(metavar="auto|N", help="Requests answered at a time; auto takes what memory and engines allow.")
]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory that answers may take, as in 8GB; engines have theirs. Default: all free."
    ),
]
DraftsOption = Annotated[
    int, typer.Option(min=0, help="Tokens to guess from the prompt and try in one step, in ONNX Runtime; same answers.")
]
EmbeddingCacheOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep encoded images here, so that they are encoded once.")
]
GroupSizeOption = Annotated[
    int | None, typer.Option(help="Weights that share a scale in int4: 32, 64 or 128. Default: 128.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="How codes of int4, nvfp4, fp8 are chosen: gptq, awq (not fp8), rtn or stored (the checkpoint's own). "
        "Default: stored where it has some, gptq otherwise."
    ),
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="Images (a folder), or JSON Lines of prompts and images, to calibrate with.")
]
CalibrationSamplesOption = Annotated[int | None, typer.Option(min=1, help="How many to take. Default: 32.")]
MaxContextOption = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer. Default: 16384, or the model's own if less.")
]
KeepActivationsOption = Annotated[
    bool, typer.Option("--keep-activations", help="Keep a gelu that config.json names; silu is published Pixtral's.")
]
LoraOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Merge a LoRA adapter, of PEFT's format or Mistral's.")
]
DeviceOption = Annotated[
    int | None,
    typer.Option(min=0, callback=use_gpu, help="The GPU to use, numbered as nvidia-smi -L does. Default: the first."),
]
FormulasOption = Annotated[
    bool, typer.Option("--formulas", help="Leave CSV cells that a spreadsheet would compute as they are.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


FLAVORS = ("rtx", "trt")
UNREAD = {
    "ort-cpu": ("device",),
    "ort-cuda": ("threads",),
    "rtx": ("threads", "drafts", "memory_limit"),
    "trt": ("threads", "drafts", "memory_limit"),
}
"""Parameters of commands that a backend does not read. Engines have their share of memory and decode a token a step."""


def typed_options(context: typer.Context, parameters: Collection[str]) -> list[str]:
    """The options behind these parameters of the command that the user typed, spelled as on the help page."""
    return [
        "/".join(name for name in (*option.opts, *option.secondary_opts) if name.startswith("--"))
        for option in context.command.params
        if option.name in parameters and _is_typed(context, option.name)
    ]


def _is_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def refuse_unused(context: typer.Context, parameters: Collection[str], reason: str, remedy: str = "") -> None:
    """Raise InputError if the user typed one of these parameters, which would do nothing for the `reason`.

    Accepted all the same is what does nothing this time but gives what was asked for: --seed at temperature 0, --force
    where nothing exists, --build with --dry-run.
    """
    from pixtral_runtime.errors import InputError

    if unknown := set(parameters) - {option.name for option in context.command.params}:
        raise KeyError(f"{context.command.name} has no parameter {min(unknown)}")
    for option in typed_options(context, parameters):
        raise InputError(f"{option} would do nothing {reason}", f"{remedy and remedy + ', or '}leave {option} away")


def refuse_unused_by_backend(context: typer.Context, backend: str) -> None:
    """Raise InputError for what a backend does not read, if the user asked for it by name."""
    for parameter in unread(context, backend):
        refuse_unused(context, (parameter,), f"with --backend {backend}", f"--backend {_reader_of(parameter)}")


def warn_of_unused(context: typer.Context, backend: str) -> None:
    """Say what a backend does not read, if `auto` took it: the same command must run on any machine.

    `backend` is what runs the bundle, and why, as `Model.backend` says it.
    """
    name = backend.partition(":")[0]
    for parameter in unread(context, name):
        for option in typed_options(context, (parameter,)):
            whom = "engines" if name in FLAVORS else name
            output.warn(f"{option} does nothing with {whom}; --backend {_reader_of(parameter)} reads it")


def unread(context: typer.Context, backend: str) -> list[str]:
    """The command's parameters that a backend does not read."""
    known = {option.name for option in context.command.params}
    return [parameter for parameter in UNREAD.get(backend, ()) if parameter in known]


def _reader_of(parameter: str) -> str:
    return "ort-cuda" if parameter == "device" else "ort-cpu"


def read_sampling(bundle: Bundle, temperature: float | None, top_p: float | None, seed: int) -> Sampling:
    """What the user typed, and for the rest what the checkpoint says, which is then said."""
    from pixtral_runtime.generation.sampling import sampling_of

    sampling = sampling_of(bundle, temperature, top_p, seed)
    if bundle.sampling is not None and temperature is None and sampling.temperature:
        output.talk(
            f"answers are drawn as the checkpoint says, at temperature {sampling.temperature:g} with top-p "
            f"{sampling.top_p:g}; --temperature 0 for the likeliest"
        )
    return sampling


def read_prompt(text: str) -> str:
    """The prompt itself, or the content of the file after `@`. Raises InputError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.text_file import read_text

    if text.startswith("@"):
        text = read_text(Path(text[1:]), "-p 'your question'").strip()
    if not text.strip():
        raise InputError("the prompt is empty", "-p 'your question'")
    return text


def token_budgets(text: str | None) -> list[int | None] | None:
    """`512,256,full` as numbers, each once, the fewest first, None for all tokens; None for no text.

    Raises InputError.
    """
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.preprocess import MIN_IMAGE_TOKENS

    if text is None:
        return None
    budgets: set[int | None] = set()
    for word in map(str.strip, text.split(",")):
        is_number = word.isascii() and word.isdecimal() and len(word) < 10
        if word != "full" and not (is_number and int(word) >= MIN_IMAGE_TOKENS):
            raise InputError(
                f"--image-tokens {text}: {word!r} is no number from {MIN_IMAGE_TOKENS} on, nor 'full'",
                "--image-tokens 256,512,full",
            )
        budgets.add(None if word == "full" else int(word))
    return sorted(budgets, key=lambda count: (count is None, count or 0))


def open_prompts(bundle: Path, mode: str, max_image_side: int | None, image_tokens: int | None) -> PromptBuilder:
    """Open a bundle's tokenizer and preprocessing, without its graphs."""
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.inputs.preprocess import default_preprocess
    from pixtral_runtime.inputs.prompt import PromptBuilder

    opened = open_bundle(bundle)
    settings = default_preprocess(opened, mode=mode, max_side=max_image_side, image_tokens=image_tokens)
    return PromptBuilder(opened, settings)


def slots_wanted(batch: str, memory_limit: str | None) -> tuple[int | None, int | None]:
    """--batch as a number, None for auto, and the bytes that may be planned with. Raises InputError."""
    from pixtral_runtime.device.memory import available_memory_bytes
    from pixtral_runtime.errors import InputError

    if batch != "auto" and not (batch.isascii() and batch.isdecimal() and int(batch)):
        raise InputError(f"--batch {batch} is neither auto nor a number from 1 on", "--batch auto")
    limit = available_memory_bytes() if memory_limit is None else output.parse_size(memory_limit, "--memory-limit")
    return (None if batch == "auto" else int(batch)), limit


def open_model(
    prompts: PromptBuilder, backend: str, threads: int, slots: int | None = 1, rows: int | None = None
) -> Model:
    """Load a bundle for about so many answers of so many cache rows at a time, and say what runs it."""
    from pixtral_runtime.generation.model import load_bundle

    model = load_bundle(prompts.bundle, prompts, threads=threads, backend=backend, slots=slots, rows=rows)
    say_backend(model)
    return model


def start_job(worker: Worker, requests: Requests, file: ResultsFile | None) -> Job:
    """Load a worker's bundle for these requests but those that a file has, and say what runs it."""
    job = worker.job(requests, {}) if file is None else worker.job(requests, file.done, file.under_way)
    say_backend(worker.model)
    return job


def say_backend(model: Model) -> None:
    """What runs a bundle, and why: aloud where it lists engines, which may have been passed over."""
    say = output.talk if model.bundle.engines else output.verbose
    say(model.backend)
