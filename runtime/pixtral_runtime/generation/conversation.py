"""A conversation with a model: each question is asked with all that was said before it.

    from pixtral_runtime import Conversation, load
    conversation = Conversation(load("bundle"))
    print(conversation.ask("What is shown?", ["photo.jpg"]).text)
    print(conversation.ask("What color is it?").text)

What the cache still holds of earlier turns is not read again, nor are their pictures scaled and encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model import Answer, Model
from pixtral_runtime.generation.sampling import Sampling, sampling_of
from pixtral_runtime.inputs.conversation import Message, user_message
from pixtral_runtime.inputs.image_files import ImageSource, open_images
from pixtral_runtime.inputs.prompt import Piece


class Conversation:
    """Questions to one model and its answers. `system` and the settings of answers may change between turns.

    An answer that was stopped is kept as far as it went. A question whose answer is empty, or failed, is not kept:
    models know no empty answers. What a reasoning model thought is not sent back to it.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> None:
        self.model, self.system, self.max_new_tokens = model, system, max_new_tokens
        self.sampling = sampling_of(model.bundle) if sampling is None else sampling
        self.last_answer: Answer | None = None
        self._turns: list[tuple[Message, Message]] = []  # question and answer
        self._under_way: Generation | None = None

    @property
    def turns(self) -> int:
        """How many questions have their answers."""
        return len(self._turns)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said, with the system prompt in front."""
        system = () if self.system is None else (Message("system", (self.system,)),)
        return (*system, *(message for turn in self._turns for message in turn))

    def ask(self, text: str, images: ImageSource | Iterable[ImageSource] = ()) -> Answer:
        """Answer a question about these images and all before. Raises InputError, ContextError where it is too much."""
        for _ in self.pieces(text, images):
            pass
        assert self.last_answer is not None
        return self.last_answer

    def stream(self, text: str, images: ImageSource | Iterable[ImageSource] = ()) -> Iterator[str]:
        """As `ask`, but yields the text while it is made. Who stops reading stops the answer."""
        return (piece.text for piece in self.pieces(text, images) if not piece.is_thinking)

    def pieces(self, text: str, images: ImageSource | Iterable[ImageSource] = ()) -> Iterator[Piece]:
        """As `stream`, with what a reasoning model thinks."""
        pictures = [picture.copy() for picture in open_images(images)]  # what was shown stays as it was
        (question,) = user_message(text, pictures)
        prompt = self.model.prompts.build((*self.messages, question))
        for picture, pixels in zip(pictures, prompt.images[len(prompt.images) - len(pictures) :], strict=True):
            self.model.prompts.kept_pixels.put(picture, pixels)
        generation = Generation(prompt, self.max_new_tokens, self.sampling)
        said = ""
        self._under_way = generation
        try:
            for piece in self.model.run(generation):
                said += "" if piece.is_thinking else piece.text
                yield piece
        except Exception:  # whoever asked hears of it; what had been said is no turn of the talk
            said = ""
            raise
        finally:
            if said.strip():
                self._turns.append((question, Message("assistant", (said,))))
            self.last_answer = replace(self.model.answer_of(generation), text=said)
            self._under_way = None

    def stop(self) -> bool:
        """Stop the answer under way, at the next token or chunk of its prompt. Returns whether there is one.

        It may be called at any time, by signal handlers and other threads too.
        """
        generation = self._under_way
        if generation is not None:
            generation.is_cancelled = True
        return generation is not None

    def undo(self) -> bool:
        """Forget the last question and its answer. Returns whether there was one."""
        return self._forget(-1)

    def forget_oldest(self) -> bool:
        """Forget the first question, its pictures and its answer. Returns whether there was one.

        The next question is read anew with all that is left, as every row of the cache rests on the rows before it.
        """
        return self._forget(0)

    def reset(self) -> None:
        """Forget all questions and answers; the system prompt stays."""
        self._turns.clear()

    def _forget(self, index: int) -> bool:
        if not self._turns:
            return False
        del self._turns[index]
        return True
