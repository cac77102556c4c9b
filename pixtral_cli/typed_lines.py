"""What a person types in a conversation: messages of one line or several, editing, a history, names completed by Tab.

The same messages come through a pipe, one a line.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pixtral_cli import output
from pixtral_cli.dropped_paths import escaped

PROMPT, MORE = "> ", ". "
BLOCK = '"""'  # around a message of several lines
HISTORY_LINES = 1000
PATIENCE_S = 1.0

ReadLine = Callable[[str], str]
"""Shows a prompt and returns a line without its end. Raises EOFError where there is none."""


def read_message(read: ReadLine) -> str:
    """The next message. It goes on behind a backslash at the end of a line, and until three quotes close a block.

    Raises EOFError where there is none.
    """
    line = read(PROMPT)
    if line.startswith(BLOCK):
        return _read_block(line.removeprefix(BLOCK), read)
    while line.endswith("\\"):
        try:
            line = f"{line[:-1]}\n{read(MORE)}"
        except EOFError:
            return line[:-1]
    return line


def _read_block(text: str, read: ReadLine) -> str:
    while not text.rstrip().endswith(BLOCK):
        try:
            text = f"{text}\n{read(MORE)}"
        except EOFError:
            return text
    return text.rstrip().removesuffix(BLOCK)


def piped_messages() -> Iterator[str]:
    """The messages of standard input, which is no terminal. Bytes that are no text become surrogates, as in paths."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    with suppress(OSError, ValueError):  # what has no descriptor is not waited for
        if not select.select([sys.stdin], [], [], PATIENCE_S)[0]:
            output.talk("reading questions from standard input, one a line; -p asks one without it")

    def read(_: str) -> str:
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    with suppress(EOFError):
        while True:
            yield read_message(read)


@contextmanager
def editing(commands: Sequence[str]) -> Iterator[None]:
    """Let `input` edit its line, recall those of earlier conversations, and complete commands and pictures' names."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        import readline
    except ImportError:  # Python may be built without it
        yield
        return
    readline.set_completer_delims(" \t\n")
    readline.set_completer(lambda _, state: _completion(commands, state))
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_history_length(HISTORY_LINES)
    file = _history_file()
    if file is not None:
        with suppress(OSError):
            readline.read_history_file(file)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # a history is no reason to fail
                readline.write_history_file(file)


def _history_file() -> Path | None:
    """The user's alone; None where it cannot be written."""
    from pixtral_runtime.files import cache_folder

    if (folder := cache_folder()) is None:
        return None
    path = folder / "conversation_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError:
        return None
    return path


def _completion(commands: Sequence[str], state: int) -> str | None:
    """The completion of this number of the word under the cursor, as readline asks for it."""
    import readline

    line = readline.get_line_buffer()[: readline.get_endidx()]
    found = completions(line, commands)
    behind = readline.get_begidx() - (len(line) - len(_last_word(line)))  # readline's word begins at any blank
    return found[state][behind:] if state < len(found) else None


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """What the last word of a line may become: a command at its beginning, folders and pictures behind `/image`."""
    word = _last_word(line)
    if word == line:
        return [f"/{name} " for name in commands if f"/{name}".startswith(line)] if line else []
    return _pictures(word) if line.startswith("/image ") else []


def _last_word(line: str) -> str:
    """From the last blank on that has no backslash before it."""
    start = max((n + 1 for n, c in enumerate(line) if c in " \t" and line[n - 1 : n] != "\\"), default=0)
    return line[start:]


def _pictures(word: str) -> list[str]:
    from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES

    typed = "".join(part if n % 2 else part.replace("\\", "") for n, part in enumerate(word.split("\\\\")))
    head, _, name = typed.rpartition("/")
    shown = f"{head}/" if "/" in typed else ""
    try:
        entries = sorted(os.scandir(os.path.expanduser(shown) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    fitting = [one for one in entries if one.name.startswith(name) and (name or not one.name.startswith("."))]
    folders = {entry.name for entry in fitting if entry.is_dir()}
    return [
        escaped(shown + entry.name) + ("/" if entry.name in folders else " ")
        for entry in fitting
        if entry.name in folders or Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
    ]
