"""llama.cpp's logits in our ids, by a binding that stands in for it, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from measure_llama_cpp import by_llama_cpp, package


class Batch:
    def __init__(self, n_tokens: int, embd: int, n_seq_max: int) -> None:
        self.rows: list[tuple[int, int, list[int], bool]] = []

    def add(self, *row: Any) -> None:
        self.rows.append(row)


class Context:
    """Answers a token with its own id in all columns, plus a hundredth of the column."""

    def __init__(self, model: Any, settings: Any) -> None:
        self.size = model.n_vocab

    def decode(self, batch: Batch) -> None:
        assert [row[1:] for row in batch.rows] == [(n, [0], True) for n in range(len(batch.rows))]
        self.tokens = [row[0] for row in batch.rows]

    def get_logits_ith(self, n: int) -> list[float]:
        return [self.tokens[n] + column / 100 for column in range(self.size)]


class Model:
    def __init__(self, path: str) -> None:
        self.path = path

    def get_vocab(self) -> SimpleNamespace:
        return SimpleNamespace(n_vocab=3)


def test_tokens_go_there_and_logits_come_back_in_our_ids() -> None:
    binding = SimpleNamespace(
        LlamaModel=Model, LlamaContext=Context, LlamaBatch=Batch, LlamaContextParams=SimpleNamespace
    )
    logits = by_llama_cpp(binding, Path("model.gguf"), np.array([2, 0, 1, 0]), threads=1)(np.array([0, 2]))
    np.testing.assert_allclose(logits, [[2.02, 2.00, 2.01, 2.00], [1.02, 1.00, 1.01, 1.00]], rtol=1e-6)
    assert logits.dtype == np.float32


def test_a_missing_package_is_named() -> None:
    with pytest.raises(SystemExit, match="package no_such_binding is missing"):
        package("no_such_binding.inner")
