"""`pixtral serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import (
    BackendOption,
    BatchOption,
    BundleArgument,
    DeviceOption,
    DraftsOption,
    EmbeddingCacheOption,
    ExifOption,
    ImageTokensOption,
    MaxImageSideOption,
    MemoryLimitOption,
    PreprocessOption,
    ThreadsOption,
    open_model,
    open_prompts,
    refuse_unused,
    refuse_unused_by_backend,
    slots_wanted,
    warn_of_unused,
)

EPILOG = "Example: pixtral serve bundle --port 8000"
KEY_VARIABLE = "PIXTRAL_API_KEY"


def serve(
    context: typer.Context,
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the folder of the bundle.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Keys that clients may have, one a line. Or one key in {KEY_VARIABLE}.")
    ] = None,
    allowed_local_media_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder below which requests may name files as file:// URLs.")
    ] = None,
    allow_remote_media: Annotated[
        bool, typer.Option("--allow-remote-media", help="Fetch pictures that requests name by http and https.")
    ] = False,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Longest body of a request.")] = "50MB",
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for their turn; more get 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request is given up.")] = 600.0,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer; less lets more run at a time.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer of requests that do not say. Default: all that is left.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked, without pictures.")] = False,
    batch_api_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the Batch API: files, batches, their results.")
    ] = None,
    max_batch_file: Annotated[str, typer.Option(metavar="SIZE", help="Longest file of the Batch API.")] = "200MB",
    batch: BatchOption = "auto",
    memory_limit: MemoryLimitOption = None,
    drafts: DraftsOption = 0,
    embedding_cache: EmbeddingCacheOption = None,
    max_image_side: MaxImageSideOption = None,
    image_tokens: ImageTokensOption = None,
    preprocess: PreprocessOption = "mistral",
    exif: ExifOption = True,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Answer requests of OpenAI's API, many at a time.

    Every option can stand in the environment as well, --port as PIXTRAL_PORT.
    """
    for package in ("starlette", "uvicorn", "prometheus_client", "python_multipart"):
        output.require(package, "serve", "Serving")
    from pixtral_runtime.batch.fit import slots_for
    from pixtral_runtime.generation.feature_cache import FeatureCache
    from pixtral_runtime.inputs.decode_memory import DecodeMemory
    from pixtral_runtime.server.app import make_app
    from pixtral_runtime.server.batches import BatchOptions
    from pixtral_runtime.server.media import Media
    from pixtral_runtime.server.preparation import THREADS
    from pixtral_runtime.server.run import Server, open_socket
    from pixtral_runtime.server.service import Limits, Service, ServiceOptions

    refuse_unused_by_backend(context, backend)
    keys = _keys(api_key_file)
    if batch_api_dir is None:
        refuse_unused(context, ("max_batch_file",), "without --batch-api-dir", "--batch-api-dir DIR")
    longest_file = output.parse_size(max_batch_file, "--max-batch-file")
    limits = Limits(queue, output.parse_size(max_body, "--max-body"), request_timeout)
    _check_folder(allowed_local_media_path)
    prompts = open_prompts(bundle, preprocess, max_image_side, image_tokens)
    wanted, memory_bytes = slots_wanted(batch, memory_limit)
    bound = open_socket(host, port)
    model = open_model(prompts, backend, threads, wanted, max_context)
    warn_of_unused(context, model.backend)
    longest = min(max_context or prompts.bundle.limits.max_context, prompts.bundle.limits.max_context)
    slots = slots_for(model, longest, wanted, memory_bytes, "--max-context N for shorter prompts and answers")
    features = None if embedding_cache is None else FeatureCache(embedding_cache, prompts.bundle.fingerprint)
    _ = prompts.tokenizer  # read now, so that the first request does not wait for it
    options = ServiceOptions(
        served_model_name or bundle.resolve().name,
        *(slots, longest, max_new_tokens, drafts, features),
        Media(allowed_local_media_path, allow_remote_media, exif, DecodeMemory(THREADS)),
        limits=limits,
        logs_prompts=log_prompts,
        batches=None if batch_api_dir is None else BatchOptions(batch_api_dir, longest_file),
    )
    service = Service(model, options)
    is_loopback = ip_address(bound.getsockname()[0]).is_loopback
    if not keys and not is_loopback:
        output.warn(f"whoever reaches {host} may ask; --api-key-file KEYS lets in those who have a key")
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    output.talk(f"{options.name}: {url}/v1, {slots} answers at a time; a page to try it: {url}")
    output.log_json_lines()
    Server(make_app(service, keys, is_loopback=is_loopback), service).run_until_ended(bound)


def _keys(path: Path | None) -> list[str]:
    """Keys of a file or of the environment. Raises InputError."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.text_file import read_lines

    lines = [os.environ.get(KEY_VARIABLE, "")] if path is None else read_lines(path, "--api-key-file KEYS.txt")
    keys = [key for line in lines if (key := line.strip())]
    if path is not None and not keys:
        raise InputError(f"{path} holds no key", "one key a line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise InputError("a key holds characters that no key has", "letters and digits, one key a line")
    return keys


def _check_folder(path: Path | None) -> None:
    from pixtral_runtime.errors import InputError

    if path is not None and not path.is_dir():
        raise InputError(f"{path} is no folder", "--allowed-local-media-path DIR")
