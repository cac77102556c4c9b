"""A conversation at the terminal: questions, commands, and pictures that are dropped on it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output
from pixtral_cli.dropped_paths import split_paths, take_pictures
from pixtral_cli.typed_lines import editing, read_message
from pixtral_runtime.errors import ContextError, InputError, PixtralError

if TYPE_CHECKING:
    from types import FrameType

    from PIL import Image

    from pixtral_runtime.generation.conversation import Conversation
    from pixtral_runtime.inputs.prompt import Piece

COMMANDS = {
    "image": ("FILE …", "add pictures to the next message; dropping them on the terminal does, too"),
    "undo": ("", "take back the pictures that wait, or the last question and its answer"),
    "forget": ("", "forget the oldest question, its pictures and its answer"),
    "reset": ("", "forget everything but the system prompt"),
    "system": ("TEXT", "set the system prompt; without a text, show it"),
    "help": ("", "show this"),
    "exit": ("", "leave, as Ctrl-D does"),
}
COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
KEYS = (
    ("Ctrl-C", "stop the answer, or clear the line; twice to leave"),
    ("\\ at a line's end", "go on in the next line"),
    ('"""', "around a message of several lines"),
)
ROOM = "/forget drops the oldest question, /reset begins anew, /undo takes the pictures back that wait"


class CtrlC(KeyboardInterrupt):
    """Ctrl-C where no answer is made; what else asks a program to stop is a plain KeyboardInterrupt."""


class Chat:
    """What a person says, line by line, and the answers. `note` hears what is done beside answering."""

    def __init__(self, conversation: Conversation, apply_exif: bool, note: Callable[[str], None]) -> None:
        self._conversation, self._exif, self._note = conversation, apply_exif, note
        self._waiting: list[Image.Image] = []  # for the next question

    @property
    def has_pictures_waiting(self) -> bool:
        return bool(self._waiting)

    def say(self, message: str) -> bool:
        """Answer a message or follow a command. Returns whether the talk goes on. Raises InputError."""
        found = COMMAND.fullmatch(message.rstrip())
        if found and (found[1] in COMMANDS or not os.path.lexists(f"/{found[1]}")):
            return self._command(found[1], found[2] or "")
        line = take_pictures(message)
        for path in line.absent:
            output.warn(f"{path} is no file here, and stays part of the question")
        self.add(line.pictures)
        if line.text:
            self._ask(line.text)
        return True

    def add(self, paths: Iterable[Path]) -> None:
        """Pictures for the next question. Raises ImageError, and ContextError where they are too many."""
        from pixtral_runtime.inputs.image_files import open_image

        for path in paths:
            self.add_picture(open_image(path, apply_exif=self._exif), str(path))

    def add_picture(self, picture: Image.Image, name: str) -> None:
        tokens, context = self._tokens(picture), self._conversation.model.context
        total = tokens + sum(map(self._tokens, self._waiting))
        if total > context:
            raise ContextError(
                f"{name}: the next message would have {total:,} tokens of pictures, of {context:,} at most"
            )
        self._waiting.append(picture)
        self._note(f"{name}: {picture.width} x {picture.height} pixels, {tokens:,} tokens")

    def _tokens(self, picture: Image.Image) -> int:
        from pixtral_runtime.inputs.preprocess import token_count

        return token_count(*self._conversation.model.prompts.preprocess.grid(*picture.size))

    def _ask(self, text: str) -> None:
        conversation, before = self._conversation, self._conversation.turns
        try:
            show_answer(conversation.pieces(text, self._waiting))
        finally:
            if is_kept := conversation.turns > before:
                self._waiting.clear()
        answer = conversation.last_answer
        assert answer is not None
        if is_kept:
            self._note_end(answer.finish_reason, answer.prompt_tokens + len(answer.token_ids))
        else:
            self._note("nothing was said: the question is not kept, and its pictures wait for the next one")
        output.verbose(
            f"{answer.prompt_tokens:,} tokens of the prompt, {answer.reused_tokens:,} of them read before, "
            f"{len(answer.token_ids):,} of the answer"
        )

    def _note_end(self, finish_reason: str, tokens: int) -> None:
        if finish_reason == "cancelled":
            self._note("stopped; what was said is kept")
        elif finish_reason == "length" and tokens >= self._conversation.model.context:
            self._note(f"cut, as the context is full; {ROOM}")
        elif finish_reason == "length":
            self._note(f"cut at {self._conversation.max_new_tokens:,} tokens, as --max-new-tokens says")

    def _command(self, name: str, text: str) -> bool:
        if name not in COMMANDS:
            known = ", ".join(f"/{one}" for one in COMMANDS)
            raise InputError(f"there is no /{name}", f"{known}; a blank before it makes it a question")
        if text and not COMMANDS[name][0]:
            raise InputError(f"/{name} takes nothing behind it", "a blank before it makes it a question")
        if name == "exit":
            return False
        getattr(self, f"_{name}")(*([text] if COMMANDS[name][0] else []))
        return True

    def _image(self, text: str) -> None:
        from pixtral_runtime.inputs.image_files import collect_images

        if not text:
            raise InputError("/image without a file", "/image FILE")
        for path in split_paths(text):
            self.add(collect_images([path], note=self._note))

    def _undo(self) -> None:
        if self._waiting:
            self._waiting.clear()
            self._note("the pictures that waited are forgotten")
        else:
            self._note("the last question is forgotten" if self._conversation.undo() else "there is nothing to undo")

    def _forget(self) -> None:
        forgotten = self._conversation.forget_oldest()
        self._note("the oldest question is forgotten" if forgotten else "there is nothing to forget")

    def _reset(self) -> None:
        self._waiting.clear()
        self._conversation.reset()
        self._note("everything is forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._note("the system prompt holds from the next question on")
        else:
            output.print_line(self._conversation.system or "there is no system prompt")

    def _help(self) -> None:
        rows = [(f"/{name} {arguments}", words) for name, (arguments, words) in COMMANDS.items()]
        for left, right in (*rows, *KEYS):
            output.print_line(f"{left:18}  {right}")


def show_answer(pieces: Iterable[Piece]) -> None:
    """An answer as it comes, and aside what was thought before it."""
    for is_thinking, group in groupby(pieces, key=lambda piece: piece.is_thinking):
        for piece in group:
            (output.think if is_thinking else output.print_piece)(piece.text)
        if is_thinking:
            output.think("\n")
    output.print_piece("\n")


def talk(
    conversation: Conversation,
    pictures: Iterable[tuple[Image.Image, str]],
    apply_exif: bool,
    messages: Iterable[str] | None,
    last_question: str,
) -> None:
    """Answer these messages, or those of the person at the terminal. The first question shows the pictures, by name."""
    chat = Chat(conversation, apply_exif, output.talk if messages is None else output.verbose)
    for picture, name in pictures:
        chat.add_picture(picture, name)
    if messages is None:
        converse(chat, conversation)
    else:
        recite(chat, messages, last_question)


def recite(chat: Chat, messages: Iterable[str], last_question: str) -> None:
    """Answer messages that nobody types, and the last question where pictures wait at the end. Raises InputError."""
    for message in messages:
        if not chat.say(message):
            return
    if chat.has_pictures_waiting:
        chat.say(last_question)


def converse(chat: Chat, conversation: Conversation) -> None:
    """Talk with a person at the terminal until they leave. What goes wrong is said, and the talk goes on."""
    output.talk("Ask, and drop pictures here. /help lists commands, Ctrl-D leaves.")
    with editing(tuple(COMMANDS)), _ctrl_c(conversation.stop):
        for message in _typed():
            try:
                if not chat.say(message):
                    return
            except CtrlC:
                output.talk("\nstopped before there was an answer; the question is not kept")
            except PixtralError as error:
                output.error_line(str(error), _hint(error))


def _typed() -> Iterator[str]:
    """Messages from the keyboard, until Ctrl-D or a second Ctrl-C in a row."""
    cleared = False
    while True:
        try:
            message = read_message(input)
            cleared = False
        except EOFError:
            output.print_line("")
            return
        except CtrlC:
            output.print_line("")
            if cleared:
                return
            cleared = True
            output.talk("Ctrl-C again leaves, as Ctrl-D does")
            continue
        yield message


@contextmanager
def _ctrl_c(stop: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C stops the answer under way; where there is none it raises CtrlC."""

    def heard(number: int, frame: FrameType | None) -> None:
        if not stop():
            raise CtrlC

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hint(error: PixtralError) -> str:
    """What to type next, here and now."""
    return ROOM if isinstance(error, ContextError) else output.hint_of(error)
