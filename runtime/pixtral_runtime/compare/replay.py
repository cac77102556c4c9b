"""What a certificate is about: texts, pictures and prompts, and what a bundle makes of them stage by stage.

All are made here by whole numbers, so that every machine has the same ones. The prompts are short: a replay is to take
a minute, on a machine that answers a few tokens a second as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.bundle.certificate import Sketch
from pixtral_runtime.compare.sketch import noise, rounded, sketch_of
from pixtral_runtime.errors import ContextError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.model_runner import ModelRunner, on_host
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.preprocess import PREPROCESS_MODES, default_preprocess
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder

TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog, doesn't it?",
    "German": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "French": "Où est passé le garçon naïf à l'œil bleu ?",
    "Chinese": "我能吞下玻璃而不伤身体。",
    "Arabic": "أنا قادر على أكل الزجاج و هذا لا يؤلمني.",
    "code": "def f(x):\n\treturn [x ** 2 for _ in range(10_000)]  # 3.14e-5\n",
    "signs": " \n\n  €µ½ 😀👩\u200d🚀 <s>[INST] [IMG]\u00a0… 1234567890",
}
QUESTIONS = ("Describe this image in one short sentence.", "What is shown?")
ANSWER_TOKENS = 8
TOP = 5  # likeliest tokens kept of each position
FEW_TOKENS = 16  # of a prefill step, where a prompt is read in several
LAYERED = ("text", "two pictures")  # prompts whose keys and values are kept layer by layer
IN_CHUNKS = "two pictures"

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Replayed:
    """One tensor that a stage made of recorded inputs."""

    stage: str
    name: str
    sketch: Sketch


@dataclass(frozen=True)
class Predicted:
    """The prediction of each token of a prompt's known answer."""

    name: str
    logits: npt.NDArray[np.float32]  # (n, V)


def pictures() -> dict[str, Image.Image]:
    """Small RGB pictures, by name."""

    def painted(mask: npt.NDArray[np.bool_], color: tuple[int, int, int]) -> Image.Image:
        return Image.fromarray(np.where(mask[..., None], np.array(color, np.uint8), np.uint8(230)))

    row, column = np.mgrid[0:96, 0:120]
    disc = (row - 31) ** 2 + (column - 31) ** 2 < 22**2
    square = (abs(row - 48) < 20) & (abs(column - 24) < 18)
    return {
        "disc": painted(disc[:64, :64], (210, 30, 40)),
        "square": painted(square[:, :48], (30, 60, 200)),
        "stripes": painted(column[:40] // 12 % 2 == 0, (20, 140, 60)),
        "texture": _texture(12, 14, 6),
    }


def _texture(rows: int, columns: int, edge: int) -> Image.Image:
    """Colored squares of `edge` pixels."""
    colors = noise("texture", rows * columns * 3).reshape(rows, columns, 3)
    return Image.fromarray(np.ascontiguousarray(colors.repeat(edge, 0).repeat(edge, 1)))


class Replay:
    """The inputs for one bundle, and what a loaded model makes of them."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self.builder = prompts
        self._bundle = prompts.bundle

    def texts(self) -> dict[str, Tokens]:
        """The token ids of each text, and of each prompt with pictures as they should be cut up."""
        texts = {name: tuple(self.builder.encode(text)) for name, text in TEXTS.items()}
        return texts | {f"prompt, {name}": tuple(map(int, one.token_ids)) for name, one in self.prompts.items()}

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """A prompt without a picture, one about two, one about each; without those that the context cannot hold."""
        shown = pictures()
        asked: dict[str, tuple[str, tuple[str, ...]]]
        asked = {"text": (TEXTS["English"], ()), "two pictures": (QUESTIONS[1], ("disc", "square"))}
        asked |= {name: (QUESTIONS[number % 2], (name,)) for number, name in enumerate(shown)}
        built = {}
        for name, (question, about) in asked.items():
            with suppress(ContextError):
                message = user_message(question, [shown[one] for one in about])
                built[name] = self.builder.build(message, ANSWER_TOKENS)
        return built

    def pixels(self) -> Iterator[Replayed]:
        """What the preprocessing makes of pictures: in each mode of one that must shrink, as the bundle says of all."""
        most = self._bundle.limits.max_image_side
        large = _texture(most // 5 + 1, most // 3 + 1, 4)
        for mode in PREPROCESS_MODES:
            yield Replayed(
                "preprocess", f"large, {mode}", sketch_of(default_preprocess(self._bundle, mode=mode)(large))
            )
        yield Replayed("preprocess", "large", sketch_of(self.builder.preprocess(large)))
        for name, picture in pictures().items():
            yield Replayed("preprocess", name, sketch_of(self.builder.preprocess(picture)))

    def vision_inputs(self) -> dict[str, npt.NDArray[np.float32]]:
        """Pixels (3, H, W): noise of one patch and in the longest strips, and the pictures."""
        edge, longest = self._bundle.model.vision.token_edge, self._bundle.limits.max_image_side
        side = default_preprocess(self._bundle).grid(longest, 1)[0]
        grids = {"1 patch": (1, 1), "wide strip": (1, side), "tall strip": (side, 1)}
        found = {name: _noise_pixels(rows * edge, columns * edge) for name, (rows, columns) in grids.items()}
        return found | {name: self.builder.preprocess(picture) for name, picture in pictures().items()}

    def features(self, model: Model, batch: int = 1) -> Iterator[Replayed]:
        """The vision graph's, small pictures encoded `batch` at a time, as answering many does."""
        small = self._bundle.limits.max_image_side // 2
        for name, image in self.vision_inputs().items():
            together = [image] * (batch if max(image.shape) <= small else 1)
            yield Replayed("vision", name, sketch_of(on_host(model.runner.encode(together)[-1])))

    def embedded(self, model: Model) -> Iterator[Replayed]:
        """What the embed graph joins of words and pictures."""
        for name, prompt in self.prompts.items():
            features = model.runner.encode_images(prompt)
            yield Replayed("embed", name, sketch_of(model.runner.embed(prompt, features)))

    def decoded(self, model: Model, answers: Mapping[str, Tokens]) -> Iterator[Replayed | Predicted]:
        """What the decoder makes of each prompt and its known answer, read token by token, whatever it says itself."""
        for name, prompt in self.prompts.items():
            yield from self._decoded(model.runner, name, prompt, answers[name])
        if IN_CHUNKS not in self.prompts:
            return
        few = ModelRunner(self._bundle, replace(model.runner.sessions, chunk=FEW_TOKENS))
        yield from self._decoded(few, IN_CHUNKS, self.prompts[IN_CHUNKS], answers[IN_CHUNKS])

    def _decoded(
        self, runner: ModelRunner, name: str, prompt: Prompt, answer: Tokens
    ) -> Iterator[Replayed | Predicted]:
        length = len(prompt.token_ids)
        cache = runner.sessions.decoder.new_cache(1, length + len(answer))
        rows = [runner.prefill(prompt, runner.encode_images(prompt), cache)[-1]]
        if name in LAYERED:
            for layer, pair in enumerate(cache.layers()):
                for kind, tensor in zip(("keys", "values"), pair, strict=True):
                    yield Replayed("decoder", f"{name}, {kind} of layer {layer}", sketch_of(tensor[0, :, :length]))
        rows += [runner.decode_token(token, length + place, cache) for place, token in enumerate(answer[:-1])]
        logits = np.stack(rows).astype(np.float32)
        yield Replayed("decoder", f"{name}, logits", sketch_of(logits))
        yield Predicted(name, logits)

    def said(self, model: Model, batch: int = 1) -> dict[str, Tokens]:
        """The tokens of the greedy answer to each prompt, the one that ends it included, `batch` prompts at a time."""
        scheduler = Scheduler(self._bundle, model.runner, batch)
        asked = {name: Generation(prompt, ANSWER_TOKENS) for name, prompt in self.prompts.items()}
        for generation in asked.values():
            scheduler.submit(generation)
        while scheduler.busy:
            scheduler.step()
        for generation in asked.values():
            if generation.error is not None:
                raise generation.error
        return {name: tuple(one.token_ids) for name, one in asked.items()}


def likeliest(logits: npt.NDArray[np.float32]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """The TOP likeliest tokens of each row (n, V), and their logits."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    best = np.take_along_axis(logits, ids, axis=1)
    return tuple(tuple(map(int, row)) for row in ids), tuple(rounded(row) for row in best)


def _noise_pixels(height: int, width: int) -> npt.NDArray[np.float32]:
    """Normalized pixels (3, H, W) within -2 to 2, that float16 and bfloat16 hold exactly."""
    values = noise(f"{height} x {width}", 3 * height * width).reshape(3, height, width)
    return values.astype(np.float32) / np.float32(64) - np.float32(2)
