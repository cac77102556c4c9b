"""An answer's text while its tokens come, and where it must end: at the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from pixtral_runtime.inputs.prompt import Piece, PromptBuilder, TextStream


class AnswerText:
    """Tokens in, pieces of text out. Held back is what may be the beginning of a stop string.

    A stop string is looked for in the answer alone, not in what a reasoning model thinks before it, and is no part of
    the text.
    """

    def __init__(self, prompts: PromptBuilder, stops: Sequence[str] = ()) -> None:
        self._prompts, self._stops = prompts, tuple(stops)
        self.begin_again()

    def begin_again(self) -> None:
        """Forget all tokens. What was taken before comes again."""
        self._stream = TextStream(self._prompts)
        self._pieces: list[Piece] = []
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> None:
        """Read one more token; `is_stopped` says whether a stop string is there now."""
        self._add(self._stream.push(token_id))

    def finish(self) -> None:
        """No token follows: what was held back belongs to the text."""
        if not self.is_stopped:
            self._add(self._stream.flush())
            self._emit(self._held)
            self._held = ""

    @property
    def pieces(self) -> Sequence[Piece]:
        """What is sure so far."""
        return self._pieces

    def _add(self, piece: Piece) -> None:
        if piece.is_thinking:
            self._pieces += [piece] if piece.text else []
            return
        text = self._held + piece.text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(found)
        sure = min(found) if found else len(text) - self._doubtful(text)
        self._emit(text[:sure])
        self._held = "" if found else text[sure:]

    def _emit(self, text: str) -> None:
        self._pieces += [Piece(text)] if text else []

    def _doubtful(self, text: str) -> int:
        """Characters at the end of a text with which a stop string may begin."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
