"""Texts that two bundles read and do not answer: the pieces, and the disk that the first one's predictions need."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from pixtral_runtime.compare.result import Skipped
from pixtral_runtime.errors import MachineError, Option
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.text_windows import BadText, Text, TextWindow, text_windows

TEXT_WINDOW = 512  # tokens of a text that are read at a time: of 131,072 words their logits are 268 MB


def windows_to_read(
    model: Model, read: Sequence[Text | BadText], most: int | None
) -> tuple[list[TextWindow], list[Skipped]]:
    """The pieces of texts, as many as are wanted, and what is no text."""
    size = min(TEXT_WINDOW, model.bundle.limits.max_context)
    texts = [text for text in read if isinstance(text, Text)]
    windows = islice((w for text in texts for w in text_windows(model.prompts, text, size)), most)
    return list(windows), [_skipped(bad) for bad in read if isinstance(bad, BadText)]


def check_disk(model: Model, folder: Path, tokens: int) -> None:
    """Refuse texts whose predictions the disk cannot hold. Raises MachineError."""
    needed = tokens * model.bundle.model.decoder.vocab_size * np.dtype(np.float32).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"predictions of {tokens} tokens of text take {needed:,} bytes in {folder.parent}, which has {free:,} left",
            Option("limit", max(1, free * (tokens // TEXT_WINDOW + 1) // (2 * needed)), "pieces of text"),
            "TMPDIR=FOLDER in front of the command",
        )


def _skipped(bad: BadText) -> Skipped:
    return Skipped(None, bad.name, f"{bad.name}: {bad.reason}", "leave it away, or give it a text")
