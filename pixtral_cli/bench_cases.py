"""What `pixtral bench` is asked for: options that would do nothing are refused, lists of numbers become cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pixtral_cli.options import refuse_unused, refuse_unused_by_backend

if TYPE_CHECKING:
    from pixtral_runtime.bench.cases import Case

OF_A_MACHINE = ("threads", "backend", "device")
OF_A_SERVER = ("model", "seed")


def check_bench_options(
    context: typer.Context, bundle: Path | None, url: str | None, mode: str, backend: str, given: set[str]
) -> None:
    """Refuse what does not go together. `given`: further options without which others do nothing. Raises InputError."""
    from pixtral_runtime.errors import InputError

    if (bundle is None) == (url is None):
        both = "a bundle or a server, and not both" if bundle else "neither a bundle nor a server to measure"
        raise InputError(both, "pixtral bench BUNDLE", "pixtral bench --url http://127.0.0.1:8000/v1")
    if url is None:
        refuse_unused(context, OF_A_SERVER, "without --url", "--url http://127.0.0.1:8000/v1")
    else:
        refuse_unused(context, OF_A_MACHINE, "with --url")
        if mode != "throughput":
            refuse_unused(context, ("batch",), f"with --url and --mode {mode}", "--mode throughput")
    if "images" in given:
        refuse_unused(context, ("image_side",), "with --images")
    if mode == "serve":
        unused = ("runs", "warmup") if url else ("runs", "min_seconds", "warmup")
        refuse_unused(context, unused, "with --mode serve", "--min-seconds 60" if url else "")
    else:
        refuse_unused(context, ("request_rate",), f"with --mode {mode}", "--mode serve")
        if url is not None:
            refuse_unused(context, ("min_seconds",), f"with --url and --mode {mode}", "--runs")
    if mode == "throughput":
        refuse_unused(context, ("min_seconds",), "with --mode throughput", "--runs")
    if "compare" not in given:
        refuse_unused(context, ("threshold",), "without --compare", "--compare SAVED.json")
    if not {"save", "plot", "html"} & given:
        refuse_unused(context, ("force",), "without --save", "--save today.json")
    refuse_unused_by_backend(context, backend)


def read_cases(
    mode: str,
    sides: str,
    prompts: str,
    decode_tokens: int,
    batches: str,
    rates: str,
    *,
    own_pictures: bool,
    of_a_server: bool,
) -> list[Case]:
    """Every combination that was asked for. Raises InputError."""
    from pixtral_runtime.bench.cases import MODES, case_combinations
    from pixtral_runtime.errors import InputError

    if mode not in MODES:
        raise InputError(f"no mode '{mode}'", f"--mode {'|'.join(MODES)}")
    chosen: list[int] | list[None] = [None] if own_pictures else _numbers(sides, "--image-side", int, 1)
    speeds: list[float] | list[None] = _numbers(rates, "--request-rate", float, 1e-6) if mode == "serve" else [None]
    return case_combinations(
        mode,
        decode_tokens,
        image_sides_px=chosen,
        prompt_tokens=_numbers(prompts, "--prompt-tokens", int, 0),
        batches=[0] if of_a_server and mode == "serve" else _numbers(batches, "--batch", int, 1),
        rates=speeds,
    )


def _numbers(text: str, option: str, kind: Any, least: float) -> list[Any]:
    from pixtral_runtime.errors import InputError

    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number < float("inf") for number in numbers):
        raise InputError(f"{option} {text} is no list of numbers from {least:g} on", f"{option} 1,2")
    return numbers
