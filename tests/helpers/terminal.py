"""A command at a terminal of its own: a test types, and reads what is shown."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from helpers.places import ROOT

PATIENCE_S = 60.0
READLINE_S = 0.2  # until it waits for keys, behind the prompt
CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"
AT_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal
from pixtral_cli.main import main
main()
"""


class Terminal:
    """`pixtral` with these arguments. `shown` is all that was on the terminal so far, with plain line ends."""

    def __init__(self, *arguments: object, cache: Path, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xf4\x01\x00\x00\x00\x00")  # 24 rows of 500 characters
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", "INPUTRC": os.devnull, "NO_COLOR": "1"}
            | {"XDG_CACHE_HOME": str(cache)}
            | environment,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._read = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt. Python's readline would miss it between the prompt and its wait for keys."""
        time.sleep(READLINE_S)
        self.type(CTRL_C)

    def until(self, words: str) -> str:
        """What is shown from the last call's words on, up to these and with them."""
        deadline = time.monotonic() + PATIENCE_S
        while (place := self.shown.find(words, self._read)) < 0:
            if not self._more(deadline):
                raise AssertionError(f"{words!r} is not shown:\n{self.shown}")
        start, self._read = self._read, place + len(words)
        return self.shown[start : self._read]

    def answer(self, message: str, prompt: str = "\n> ") -> str:
        """What is shown between a message, typed and echoed, and the next prompt."""
        self.type(message + "\n")
        self.until(message + "\n")
        self._read -= 1
        return self.until(prompt).removesuffix(prompt).removeprefix("\n")

    def until_more(self, characters: int) -> None:
        """Wait until so many more are shown."""
        while len(self.shown) < self._read + characters:
            assert self._more(time.monotonic() + PATIENCE_S), self.shown

    def end(self) -> int:
        """Wait for the end. Returns the exit code."""
        while self._more(time.monotonic() + PATIENCE_S):
            pass
        code = self.process.wait(PATIENCE_S)
        self.close()
        return code

    def close(self) -> None:
        """However it stands."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _more(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # as Linux says that nobody has the other side open
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "")
        return bool(data)
