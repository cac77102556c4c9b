"""The Python API: load a bundle, ask it questions.

from pixtral_runtime import load
model = load("bundle")
print(model.generate("What is this?", ["photo.jpg"]).text)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixtral_runtime.backends.choose import open_backend
from pixtral_runtime.backends.session import Sessions
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.errors import BundleError, RequestError
from pixtral_runtime.generation.generation import Generation, StageTimes
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.sampling import Sampling, sampling_of
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.conversation import Message, user_message
from pixtral_runtime.inputs.image_files import ImageSource, open_images, with_pictures
from pixtral_runtime.inputs.preprocess import Preprocess, default_preprocess
from pixtral_runtime.inputs.prompt import Piece, Prompt, PromptBuilder, TextStream


@dataclass(frozen=True)
class Answer:
    """An answer. `finish_reason` is "stop" where the model ended it, "length" where the limit did.

    `thinking` is what a reasoning model wrote in a block before the text, None without one. The tokens are all of them.
    `reused_tokens` of the prompt were in the cache already. An answer that was cancelled is "cancelled".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    times: StageTimes = field(compare=False)
    thinking: str | None = None
    reused_tokens: int = field(default=0, compare=False)


class Model:
    """A loaded bundle."""

    def __init__(self, bundle: Bundle, sessions: Sessions, prompts: PromptBuilder, backend: str = "") -> None:
        self.bundle = bundle
        self.prompts = prompts
        self.runner = ModelRunner(bundle, sessions)
        self._scheduler = Scheduler(bundle, self.runner)
        self.backend = backend  # what runs it and why

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._scheduler.context

    def generate(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer a text prompt over one image or several (images first), or a whole conversation. Raises InputError.

        An image is a path, a file's bytes, a Pillow image or an array (rows, columns, 3) of uint8. Without `sampling`
        answers are drawn as the checkpoint says, greedily where it says nothing.
        """
        return self.answer(self._prompt(prompt, images, system), max_new_tokens, self._sampling(sampling))

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """As `generate`, but yields the text piece by piece while it is made."""
        pieces = self.answer_stream(self._prompt(prompt, images, system), max_new_tokens, self._sampling(sampling))
        yield from (piece.text for piece in pieces if not piece.is_thinking)

    def answer(self, prompt: Prompt, max_new_tokens: int = 128, sampling: Sampling = Sampling()) -> Answer:  # noqa: B008
        """Answer a prompt that was built before, greedily unless told otherwise."""
        generation = Generation(prompt, max_new_tokens, sampling)
        for _ in self._scheduler.run(generation):
            pass
        return self.answer_of(generation)

    def answer_stream(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
        """As `answer`, but yields the pieces of text as they are made, thoughts among them."""
        return self.run(Generation(prompt, max_new_tokens, sampling))

    def run(self, generation: Generation) -> Iterator[Piece]:
        """The pieces of a generation's text as they are made, until it is done or `is_cancelled`."""
        text = TextStream(self.prompts)
        for token in self._scheduler.run(generation):
            if (piece := text.push(token)).text:
                yield piece
        if (rest := text.flush()).text:
            yield rest

    def answer_of(self, generation: Generation) -> Answer:
        """What a generation that has run has come to."""
        tokens = tuple(generation.token_ids)
        text, thinking = self.prompts.read_answer(tokens)
        return Answer(
            text=text,
            token_ids=tokens,
            finish_reason=generation.finish_reason or "cancelled",
            prompt_tokens=len(generation.prompt.token_ids),
            image_tokens=generation.prompt.image_tokens,
            times=generation.times,
            thinking=thinking,
            reused_tokens=generation.reused_tokens,
        )

    def _sampling(self, asked: Sampling | None) -> Sampling:
        return sampling_of(self.bundle) if asked is None else asked

    def _prompt(
        self, prompt: str | Sequence[Message], images: ImageSource | Iterable[ImageSource], system: str | None
    ) -> Prompt:
        pictures = open_images(images)
        if isinstance(prompt, str):
            return self.prompts.build(user_message(prompt, pictures, system))
        if not isinstance(prompt, list | tuple) or not all(isinstance(message, Message) for message in prompt):
            raise RequestError(f"a prompt of {type(prompt).__name__} is no text", "a string, or a list of Message")
        if pictures or system is not None:
            raise RequestError(
                "images and system go with a prompt of text", "put them into the messages: Message('system', ('…',))"
            )
        return self.prompts.build(with_pictures(prompt))


def load(path: str | Path, *, threads: int = 0, preprocess: Preprocess | None = None, backend: str = "auto") -> Model:
    """Load a bundle. Raises InputError for a broken bundle, MachineError where it cannot run here."""
    if not isinstance(path, str | Path):
        raise BundleError(f"{path!r} is no path of a bundle", "load('bundle')")
    bundle = open_bundle(Path(path))
    return load_bundle(
        bundle, PromptBuilder(bundle, preprocess or default_preprocess(bundle)), threads=threads, backend=backend
    )


def load_bundle(
    bundle: Bundle,
    prompts: PromptBuilder,
    *,
    threads: int = 0,
    backend: str = "auto",
    slots: int | None = 1,
    rows: int | None = None,
) -> Model:
    """Open a bundle's sessions on a backend of `choose.BACKENDS`, for about so many answers of so many cache rows."""
    opened = open_backend(bundle, backend, threads=threads, slots=slots, rows=rows)
    return Model(bundle, opened.sessions, prompts, f"{opened.backend}: {opened.reason}")
