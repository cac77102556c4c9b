"""One request on its way through the model: what was asked, what has become of it, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pixtral_runtime.errors import Option, PixtralError, SettingError
from pixtral_runtime.generation.answer_text import AnswerText
from pixtral_runtime.generation.logits import TokenLogprob
from pixtral_runtime.generation.sampling import Constraint, Sampling
from pixtral_runtime.inputs.prompt import Prompt


@dataclass
class StageTimes:
    """Where a request's time went, in milliseconds. A step that serves several requests counts for each in full."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


@dataclass(eq=False)
class Generation:
    """One request, and what has become of it. `finish_reason` is None until it is done; then `error` may be set.

    `text`, where it is given, reads the tokens as they come, and ends the answer at a stop string. `logit_bias` is
    added to the logits of these tokens. With `top_logprobs` every token's log-probability is kept, beside those of so
    many of the likeliest. `is_cancelled` may be set at any time, by a signal handler too: who runs it stops soon.
    Raises SettingError for an answer of no token.
    """

    prompt: Prompt
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    text: AnswerText | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: PixtralError | None = None
    reused_tokens: int = 0
    is_cancelled: bool = False
    times: StageTimes = field(default_factory=StageTimes)

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise SettingError(f"sampling is {self.sampling!r}", "Sampling(temperature=0.7)")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise SettingError(
                f"an answer of {self.max_new_tokens!r} tokens", Option("max_new_tokens", 128, "or another from 1 on")
            )

    def begin_again(self) -> None:
        """Forget the tokens that were made."""
        self.token_ids.clear()
        self.logprobs.clear()
        if self.text is not None:
            self.text.begin_again()

    def fail(self, error: PixtralError) -> None:
        """End it with an error, without the frames that it came through: they hold the memory that was too little."""
        self.error, self.finish_reason = error, "error"
        held: BaseException | None = error
        while held is not None:
            held.__traceback__ = None
            held = held.__cause__ or held.__context__


def milliseconds_since(started: float) -> float:
    """From a moment of `time.perf_counter` until now."""
    return (time.perf_counter() - started) * 1e3
