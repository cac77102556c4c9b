"""What `pixtral compare` found, as data: `compare` fills it, `page` and the command line show it.

Logits come first because they decide; texts come second (specification section 6.1: greedy near-ties flip, so the exact
text is no criterion).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NEAR_TIE_NATS = 0.1  # specification section 6.1


@dataclass(frozen=True)
class LogitsDifference:
    """Both bundles' predictions of the reference's answers and of the texts, over all positions of all cases."""

    positions: int
    kl_mean_nats: float  # KL(reference || candidate)
    kl_median_nats: float
    kl_p95_nats: float
    kl_max_nats: float
    top1_agreement: float  # share of the positions where both prefer the same token
    disagreements: int
    near_ties: int  # disagreements where the reference's own two best are less than NEAR_TIE_NATS apart


@dataclass(frozen=True)
class LayerDifference:
    """Signal-to-noise ratio of one decoder layer's cache in dB; None where there is no noise at all."""

    layer: int
    key_db: float | None
    value_db: float | None

    @property
    def worst_db(self) -> float:
        """The lower of the two, infinite where both are exact."""
        return min((db for db in (self.key_db, self.value_db) if db is not None), default=float("inf"))


@dataclass(frozen=True)
class WorstLayer:
    layer: int
    tensor: str  # key or value
    snr_db: float


@dataclass(frozen=True)
class AnswersDifference:
    """Free-running greedy answers."""

    exact_match: float  # share of the cases with the same text
    similarity_mean: float  # of difflib's ratio over words; 1 where all are the same


@dataclass(frozen=True)
class Side:
    """One of the two bundles. Speeds are medians over the cases, None where no step was timed."""

    bundle: str
    fingerprint: str
    precision: str
    dtype: str
    bundle_bytes: int
    load_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class CaseDifference:
    """One image with one prompt, or the beginning of a piece of text that was read and not answered.

    Token indices count from the answer's first token, or the text's; None where there is none.
    """

    image: str | None
    prompt: str
    prompt_tokens: int
    positions: int
    kl_mean_nats: float
    kl_max_nats: float
    top1_agreement: float
    first_diverging_token: int | None  # where the preferred tokens differ first, both reading the same text
    reference_answer: str | None
    answer: str | None
    similarity: float | None
    first_different_token: int | None  # where the free-running answers differ first
    text: str | None = None  # where the piece of text is from: its file and first token


@dataclass(frozen=True)
class Skipped:
    """What could not be used. `prompt` is None where the image itself cannot be read, and names a text that is none."""

    image: str | None
    prompt: str | None
    reason: str
    hint: str


@dataclass(frozen=True)
class BundleComparison:
    """The whole report; `to_dict` is what `--json` prints."""

    logits: LogitsDifference
    image_features_db: float | None  # None without noise; see `images`
    images: int  # cases with an image
    layers: tuple[LayerDifference, ...]
    worst_layer: WorstLayer | None  # None where no layer has noise
    answers: AnswersDifference | None  # None where texts were read and nothing was answered
    reference: Side
    candidate: Side
    settings: dict[str, Any]
    cases: tuple[CaseDifference, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def db_text(snr_db: float | None) -> str:
    """A signal-to-noise ratio for people."""
    return "exact" if snr_db is None else f"{snr_db:.1f} dB"


def speed_text(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"
