"""The shapes that engines are built for: optimization profiles, from the bundle's tensors and the user's limits.

A profile gives each dimension letter of `pixtral_runtime.bundle.spec` its smallest, usual and largest size. TensorRT
picks kernels for the usual one and reserves memory for the largest, so stages of unlike shapes get a profile each:
small and document-sized images, prefill and decode. Users may write profiles of their own, as in
`vision:H=16..512..1024,W=512`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixtral_runtime.bundle.spec import GRAPHS, PREFILL_CHUNK_TOKENS
from pixtral_runtime.errors import Option, Remedy, SettingError
from pixtral_runtime.inputs.preprocess import token_count

if TYPE_CHECKING:
    from pixtral_runtime.bundle.manifest import Bundle
    from pixtral_runtime.bundle.spec import TensorSpec

Range = tuple[int, int, int]
"""Smallest, usual and largest."""
Profile = dict[str, Range]
"""By dimension letter."""

TEXT_TOKENS = 512  # of prompt and answer beside the largest image, in the default context
ROWS_STEP = 256


@dataclass(frozen=True)
class Shapes:
    """What engines of a bundle must serve: `context` cache rows a slot, `batch` slots, prefill in steps of `chunk`."""

    context: int
    batch: int = 1
    chunk: int = PREFILL_CHUNK_TOKENS

    @classmethod
    def of(cls, bundle: Bundle, context: int | None = None, batch: int = 1, chunk: int = 256) -> Shapes:
        """Limits with the default context: the largest image and some text. Raises SettingError."""
        side = bundle.limits.max_image_side // bundle.model.vision.token_edge
        usual = -(-(token_count(side, side) + TEXT_TOKENS) // ROWS_STEP) * ROWS_STEP
        rows = min(usual, bundle.limits.max_context) if context is None else context
        wanted = {Option("context", "N"): rows, Option("batch", "N"): batch, Option("chunk", "N"): chunk}
        for option, number in wanted.items():
            if number < 1:
                raise SettingError(f"{option.name} is {number}, less than 1", option)
        if rows > bundle.limits.max_context:
            raise SettingError(
                f"a context of {rows} rows is more than the bundle's {bundle.limits.max_context}",
                Option("context", bundle.limits.max_context),
                f"pixtral export … --max-context {rows}",
            )
        return cls(rows, batch, min(chunk, rows))


def profiles(bundle: Bundle, graph: str, shapes: Shapes) -> list[Profile]:
    """The profiles of a graph's engine.

    Prefill is of one slot. But where the slots of one of a decoder's profiles are fixed and those of the other are not,
    TensorRT-RTX 1.7 joins products in one of them only, and stores their weights in two forms: 491 MB instead of 307
    for two layers of the 12B in int4. Where both are fixed, it stores all but int4 in two forms.
    """
    one, slots, rows = (1, 1, 1), (1, shapes.batch, shapes.batch), (shapes.context,) * 3
    chunk = (1, shapes.chunk, shapes.chunk)
    if graph == "vision":
        return _vision(bundle, slots)
    if graph == "embed":
        return [{"B": one, "T": chunk, "F": chunk}, {"B": slots, "T": one, "F": one}]
    most = shapes.batch if bundle.precision == "int4" else max(2, shapes.batch)
    few, slots = (1, 1, min(2, most)), (1, shapes.batch, most)
    return [{"B": few, "T": chunk, "R": few, "C": rows}, {"B": slots, "T": one, "R": slots, "C": rows}]


def read_profiles(bundle: Bundle, shapes: Shapes, texts: Sequence[str]) -> dict[str, list[Profile]]:
    """All graphs' profiles: the ones that `texts` give, and those of `profiles` for graphs they do not name.

    A text is `GRAPH:LETTER=SIZES,…`, its sizes `largest`, `smallest..largest` or `smallest..usual..largest`. Raises
    SettingError where one cannot be read, exceeds the limits, or where no profile takes a call that the runtime makes.
    """
    own: dict[str, list[Profile]] = {}
    for text in texts:
        graph, colon, sizes = text.partition(":")
        if graph not in GRAPHS or not colon:
            known = Option("profile", f"{'|'.join(GRAPHS)}:LETTER=SIZES,…")
            raise SettingError(f"profile {text}: no graph '{graph}'", known)
        own.setdefault(graph, []).append(_read(bundle, graph, shapes, sizes))
    for graph, listed in own.items():
        for call in _calls(bundle, graph, shapes, listed):
            if not any(all(one[letter][0] <= n <= one[letter][2] for letter, n in call.items()) for one in listed):
                wanted = ",".join(f"{letter}={n}" for letter, n in call.items())
                raise SettingError(
                    f"no profile of {graph} takes {wanted}, which answering with a batch of {shapes.batch} and "
                    f"a chunk of {shapes.chunk} comes to",
                    Option("profile", f"{graph}:LETTER=SIZES,…"),
                    Option("batch", "SMALLER"),
                    Option("chunk", "SMALLER"),
                )
    return {graph: own.get(graph) or profiles(bundle, graph, shapes) for graph in GRAPHS}


def _read(bundle: Bundle, graph: str, shapes: Shapes, text: str) -> Profile:
    """One profile. Letters that are left out take all that the limits allow, R what B and F what T takes."""
    limits = _limits(bundle, graph, shapes)
    given: Profile = {}
    for part in text.split(","):
        letter, _, sizes = (piece.strip() for piece in part.partition("="))
        if letter not in limits or letter in given:
            problem = "is there twice" if letter in given else f"is no dimension of {graph}"
            raise SettingError(f"profile {graph}:{text}: '{letter}' {problem}", f"{graph} has {', '.join(limits)}")
        given[letter] = _sizes(f"profile {graph}:{text}: {letter}", sizes, *limits[letter])
    for letter, other in (("R", "B"), ("F", "T")):
        if letter in limits and other in given:
            given.setdefault(letter, given[other])
    return {letter: given.get(letter, (low, high, high)) for letter, (low, high, _, _) in limits.items()}


def _sizes(where: str, text: str, low: int, high: int, step: int, limit: Remedy) -> Range:
    """Sizes between `low` and `high` in steps; `limit` is the setting that moves the end."""
    numbers = text.split("..")
    if len(numbers) > 3 or not all(number.strip().isdecimal() for number in numbers):
        raise SettingError(f"{where} cannot be '{text}'", "512, 16..512 or 16..256..512: smallest, usual, largest")
    sizes = [int(number) for number in numbers]
    smallest, usual, largest = sizes[0], sizes[-2] if len(sizes) == 3 else sizes[-1], sizes[-1]
    if not low <= smallest <= usual <= largest <= high:
        raise SettingError(f"{where}={text} is not a rising range within {low}..{high}", limit)
    if any(size % step for size in sizes):
        raise SettingError(f"{where}={text} has sizes that are not multiples of {step}", f"{largest // step * step}")
    return smallest, usual, largest


def _limits(bundle: Bundle, graph: str, shapes: Shapes) -> dict[str, tuple[int, int, int, Remedy]]:
    """Smallest and largest size of each letter of a graph's inputs, its step, and what sets the largest."""
    patch, side = bundle.model.vision.token_edge, bundle.limits.max_image_side // bundle.model.vision.token_edge
    pixels = (patch, side * patch, patch, "pixtral export … --max-image-side N")
    batch, chunk = Option("batch", "N", "sets the limit"), Option("chunk", "N", "sets the limit")
    known: dict[str, tuple[int, int, int, Remedy]] = {
        "B": (1, shapes.batch, 1, batch),
        "H": pixels,
        "W": pixels,
        "T": (1, shapes.chunk, 1, chunk),
        "F": (1, shapes.chunk, 1, chunk),
        "R": (1, shapes.batch, 1, batch),
        "C": (shapes.context, shapes.context, 1, Option("context", "N", "sets the limit")),
    }
    letters = dict.fromkeys(dim for tensor in bundle.graph_spec(graph).inputs for dim in tensor.shape)
    return {letter: known[letter] for letter in letters if isinstance(letter, str)}


def _calls(bundle: Bundle, graph: str, shapes: Shapes, listed: Sequence[Profile]) -> Iterator[Mapping[str, int]]:
    """What the runtime asks of a graph. Engines need not take images of all sizes, but some of each that they take."""
    tokens, slots = range(1, shapes.chunk + 1), range(1, shapes.batch + 1)
    if graph == "vision":
        half = bundle.limits.max_image_side // 2 // bundle.model.vision.token_edge * bundle.model.vision.token_edge
        for (low, _, high), (narrow, _, wide) in ((one["H"], one["W"]) for one in listed):
            yield from ({"B": 1, "H": low, "W": narrow}, {"B": 1, "H": high, "W": wide})
            if max(low, narrow) <= half:  # images that are encoded together
                yield {"B": shapes.batch, "H": min(high, half), "W": min(wide, half)}
    elif graph == "embed":
        yield from ({"B": 1, "T": n, "F": used} for n in tokens for used in (1, n))
        yield from ({"B": n, "T": 1, "F": 1} for n in slots)
    else:
        yield from ({"B": 1, "T": n, "R": 1} for n in tokens)
        yield from ({"B": n, "T": 1, "R": n} for n in slots)


def _vision(bundle: Bundle, slots: Range) -> list[Profile]:
    """Images up to half the largest side, several at once, and up to the largest side, one by one."""
    patch, side = bundle.model.vision.token_edge, bundle.limits.max_image_side

    def up_to(share: float, usual: float) -> Range:
        largest, middle = (max(1, int(side * part) // patch) * patch for part in (share, usual))
        return patch, middle, largest

    return [
        {"B": slots, "H": up_to(1 / 2, 3 / 8), "W": up_to(1 / 2, 3 / 8)},
        {"B": (1, 1, 1), "H": up_to(1, 3 / 4), "W": up_to(1, 1)},
    ]


def ranges(tensor: TensorSpec, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, usual and largest shape of a tensor."""
    per_axis = [(dim, dim, dim) if isinstance(dim, int) else profile[dim] for dim in tensor.shape]
    smallest, usual, largest = zip(*per_axis, strict=True)
    return smallest, usual, largest
