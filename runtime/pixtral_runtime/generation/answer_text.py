"""An answer's text while its tokens come, and where it must end: at the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from pixtral_runtime.inputs.conversation import ToolCall
from pixtral_runtime.inputs.prompt import Piece, PromptBuilder, TextStream


class AnswerText:
    """Tokens in, pieces of text out. Held back is what may be the beginning of a stop string.

    A stop string is looked for in the answer alone, not in what a reasoning model thinks before it, nor in calls, and
    is no part of the text.

    With `may_call` calls of tools are no text either: they are `tool_calls` when it is finished. Malformed ones come
    as text then, and `is_malformed` says so.
    """

    def __init__(self, prompts: PromptBuilder, stops: Sequence[str] = (), may_call: bool = False) -> None:
        self._prompts, self._stops = prompts, tuple(stops)
        self._call = prompts.call_tokens.call if may_call else None
        self.begin_again()

    def begin_again(self) -> None:
        """Forget all tokens. What was taken before comes again."""
        self._stream = TextStream(self._prompts)
        self._pieces: list[Piece] = []
        self._held = ""
        self._call_ids: list[int] = []
        self.is_stopped = False
        self.tool_calls: tuple[ToolCall, ...] = ()
        self.is_malformed = False

    def push(self, token_id: int) -> None:
        """Read one more token; `is_stopped` says whether a stop string is there now."""
        if self._call_ids or token_id == self._call:
            self._call_ids.append(token_id)
        else:
            self._add(self._stream.push(token_id))

    def finish(self) -> None:
        """No token follows: what was held back belongs to the text."""
        if self.is_stopped:
            return
        self._add(self._stream.flush())
        if self._call_ids:
            calls = self._prompts.read_calls(self._call_ids)
            self.tool_calls, self.is_malformed = calls or (), calls is None
            self._held += self._prompts.detokenize(self._call_ids) if calls is None else ""
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
