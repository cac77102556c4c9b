"""How near a setting's predictions are to those of the one that the others are judged by, along that one's answers.

That setting answers, then each setting reads the answer token by token, whatever it would have said itself. The score
of an example is exp(-KL) of the mean divergence of its tokens: 1 where all is predicted alike, and the share of
perplexity that is left otherwise. Of each token the likeliest `TOP` are told apart and all others count as one, so that
an answer takes 1 kB a token and not a megabyte: that is never more than the whole divergence, and what is left out are
words that nobody would say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixtral_runtime.compare.forced import forced_pass
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tuning_measured import Measured
from pixtral_runtime.generation.logits import log_softmax
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.image_files import with_pictures
from pixtral_runtime.inputs.prompt import Prompt

DIVERGENCE = "divergence"
"""The name among metrics."""
TOP = 128
LEAST_SHARE = 1e-12  # of all other tokens: rounding may leave less than nothing

Progress = Callable[[str, int, int], None]
"""Called with what is done, how often and of how many."""


@dataclass(frozen=True)
class Predicted:
    """An answer of n tokens, and of each the K likeliest tokens (n, K) with their probabilities' logarithms (n, K)."""

    token_ids: tuple[int, ...]
    likeliest: npt.NDArray[np.int32]
    nats: npt.NDArray[np.float32]


class Nearness:
    """How near each setting is to the one that all are judged by, the `reference`. Settings are numbers.

    `models` load a setting's model. In what is kept as `measured`, `key` names a setting, and `asked` an example that
    the reference has answered, by its question and its pictures' contents: they may change under the same id.
    """

    def __init__(
        self,
        models: Mapping[int, Callable[[], Model]],
        reference: int,
        max_new_tokens: int,
        measured: Measured,
        key: Callable[[int], str],
        asked: Callable[[Example], str],
        progress: Progress,
    ) -> None:
        self._models, self._reference, self._max_new_tokens = models, reference, max_new_tokens
        self._measured, self._key, self._asked, self._progress = measured, key, asked, progress
        self._predicted: dict[str, Predicted] = {}

    def score(self, setting: int, example: Example) -> float:
        """exp(-KL), from 0 to 1; NaN where it was not worked out."""
        if setting == self._reference:
            return 1.0
        return math.exp(-self._measured.of(self._measure(setting)).get(self._asked(example), math.nan))

    def predict(self, setting: int, examples: Sequence[Example]) -> float:
        """Have the reference answer what is missing for the setting's scores. Seconds an example took here."""

        def answer(model: Model, example: Example) -> None:
            self._predicted[example.id] = predicted(model, example, self._max_new_tokens)

        missing = [one for one in self._missing(setting, examples) if one.id not in self._predicted]
        return self._each("predictions", self._reference, missing, answer)

    def work_out(self, setting: int, examples: Sequence[Example]) -> float:
        """The scores of these examples, which the reference has predicted. Seconds an example took here.

        Raises BundleError where a model computes NaN.
        """
        measure = self._measure(setting)

        def read(model: Model, example: Example) -> None:
            nats = nats_along(model, example, self._predicted[example.id])
            self._measured.keep(measure, {self._asked(example): nats})

        try:
            return self._each(DIVERGENCE, setting, self._missing(setting, examples), read)
        finally:
            self._measured.save()

    def _missing(self, setting: int, examples: Sequence[Example]) -> list[Example]:
        known = self._measured.of(self._measure(setting))
        return [] if setting == self._reference else [one for one in examples if self._asked(one) not in known]

    def _each(
        self, stage: str, setting: int, examples: Sequence[Example], work: Callable[[Model, Example], None]
    ) -> float:
        if not examples:
            return 0.0
        model, started = self._models[setting](), time.monotonic()
        for done, example in enumerate(examples):
            self._progress(stage, done, len(examples))
            work(model, example)
        self._progress(stage, len(examples), len(examples))
        return (time.monotonic() - started) / len(examples)

    def _measure(self, setting: int) -> str:
        return f"nats a token, {self._key(setting)} along {self._key(self._reference)}"


def predicted(model: Model, example: Example, max_new_tokens: int) -> Predicted:
    """The model's own answer. Raises ImageError for pictures that cannot be read, BundleError on NaN."""
    prompt = _prompt(model, example)
    answer = model.answer(prompt, max_new_tokens)
    _, logits, _ = forced_pass(model, prompt, answer.token_ids)
    likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    nats = np.take_along_axis(_logarithms(logits), likeliest, 1)
    return Predicted(answer.token_ids, likeliest.astype(np.int32), nats.astype(np.float32))


def nats_along(model: Model, example: Example, along: Predicted) -> float:
    """Mean KL of the model's predictions from those of another one, along that one's answer. Raises as `predicted`."""
    _, logits, _ = forced_pass(model, _prompt(model, example), along.token_ids)
    theirs = np.take_along_axis(_logarithms(logits), along.likeliest.astype(np.int64), 1)
    return divergence_nats(along.nats.astype(np.float64), theirs)


def divergence_nats(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    """Mean KL(ours || theirs) of rows of some tokens' logarithms (n, K), all other tokens counting as one."""
    rest, rest_of_theirs = (np.maximum(1 - np.exp(nats).sum(1), LEAST_SHARE) for nats in (ours, theirs))
    known = (np.exp(ours) * (ours - theirs)).sum(1)
    return max(0.0, float((known + rest * np.log(rest / rest_of_theirs)).mean()))


def _logarithms(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.stack([log_softmax(row) for row in logits])


def _prompt(model: Model, example: Example) -> Prompt:
    return model.prompts.build(with_pictures(example.messages))
