"""The imitations that recipes are measured beside, the text that is read, and a tokenizer's way into tekken's form."""

from __future__ import annotations

import numpy as np
import torch

from convert_gguf import SPECIAL_TOKENS, byte_of_letter, old_ids, tokens_in_order
from measure_text import Score, blocks, eight_bits, split


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_q4_0_keeps_the_largest_of_a_group_with_its_sign() -> None:
    weight = noise(64, 5)
    rounded = blocks(weight, 32, 4)
    for group in (slice(0, 32), slice(32, 64)):
        for column in range(5):
            place = weight[group, column].abs().argmax()
            largest = weight[group, column][place]
            torch.testing.assert_close(rounded[group, column][place], largest, rtol=1e-3, atol=0)
            codes = rounded[group, column] / (largest / -8)
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=0.01)
            assert codes.min() > -8.01 and codes.max() < 7.01


def test_q8_0_is_nearer_than_half_a_step() -> None:
    weight = noise(64, 5)
    step = weight.unflatten(0, (2, 32)).abs().amax(1) / 127
    assert ((blocks(weight, 32, 8) - weight).abs() <= 0.51 * step.repeat_interleave(32, 0)).all()


def test_each_row_has_its_own_scale() -> None:
    x = noise(3, 8) * torch.tensor([1.0, 1e3, 1e-3])[:, None]
    assert ((eight_bits(x, -1, "int8") - x).abs() <= 0.51 / 127 * x.abs().amax(-1, keepdim=True)).all()


def test_no_document_is_both_calibrated_with_and_read() -> None:
    own, read = split()
    assert own and read and not set(own) & set(read)


def test_a_model_is_nowhere_apart_from_itself() -> None:
    logits = noise(5, 7).numpy()
    score, uniform = Score(), Score()
    score.add(np.arange(5), logits, logits)
    uniform.add(np.arange(5), np.zeros((5, 7), np.float32), np.zeros((5, 7), np.float32))
    assert score.row()["kl_nats"] == 0 and score.row()["top1"] == 1 and score.positions == 4
    assert uniform.row()["perplexity"] == 7


def test_bytes_come_first_and_merges_in_their_order() -> None:
    letters = byte_of_letter()
    assert sorted(letters.values()) == list(range(256)) and letters["Ġ"] == 32
    order = tokens_in_order(["<|end|>", "b", "a", "ab", "Ġa"], [3, 1, 1, 1, 1])
    assert [token for token, _ in order[:256]] == [bytes([n]) for n in range(256)]
    assert (order[ord("a")][1], order[ord("b")][1]) == (2, 1)
    assert order[256:] == [(b"ab", 3), (b" a", 4)]


def test_an_id_of_ours_is_a_token_or_a_mark_of_the_file() -> None:
    order = tokens_in_order(["<|end|>", "<|im_start|>", "a", "ab"], [3, 3, 1, 1])
    ids = old_ids(order)
    assert len(ids) == SPECIAL_TOKENS + len(order)
    assert (ids[0], ids[3], ids[4]) == (0, 1, 2)
    assert (ids[SPECIAL_TOKENS + ord("a")], ids[-1]) == (2, 3)
