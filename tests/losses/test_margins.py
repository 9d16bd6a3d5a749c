"""The best other token against a brute-force search of the whole vocabulary in fp64, alone and over ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.logprobs import token_logprobs
from ctpd_nemo.losses.margins import label_and_best_other
from tests.losses.ranks import SHARED, SHARED_IDS, run_ranks, shared_cases
from tests.rounding import Rounded, assert_within

VOCAB, HIDDEN, TOKENS = 37, 12, 61


def case(rows: int = VOCAB, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels; every third label is the likeliest token, and padding would win if it could."""
    draw = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(TOKENS, HIDDEN, generator=draw)
    weight = torch.randn(rows, HIDDEN, generator=draw)
    weight[VOCAB:] *= 50
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    labels[::3] = (hidden @ weight[:VOCAB].T).argmax(1)[::3]
    return hidden, weight, labels


def brute_force(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Rounded, Rounded]:
    every = (Rounded.given(hidden) @ Rounded.given(weight[:VOCAB]).T).log_softmax()
    rows = zip(every.exact.tolist(), labels.tolist(), strict=True)
    others = [max((value, word) for word, value in enumerate(row) if word != label)[1] for row, label in rows]
    # Where rounding makes another one the best, its log-prob is no further off.
    return tuple(every.gather(1, words[:, None]).squeeze(1) for words in (labels, torch.tensor(others)))


@pytest.mark.parametrize("chunk", [1, VOCAB * 7, 2**24], ids=["1 a chunk", "7 a chunk", "one chunk"])
@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 6], ids=["exact", "padded"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "peaked"])
def test_label_and_best_other_are_those_of_a_search(
    chunk: int, rows: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", chunk)
    inputs = case(rows, scale)
    found, expected = label_and_best_other(*inputs, VOCAB), brute_force(*inputs)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_within(mine, true)
    margins = found[0] - found[1]
    assert (margins[::3] > 0).all()
    assert (margins < 0).any()


def test_log_probs_of_labels_are_those_that_training_has() -> None:
    inputs = case()
    expected = brute_force(*inputs)[0]
    for found in (label_and_best_other(*inputs, VOCAB)[0], token_logprobs(*inputs, VOCAB)):
        assert_within(found, expected)


def test_a_tie_is_a_margin_of_zero() -> None:
    weight = torch.zeros(3, 2)
    weight[:2] = 1.0
    label, other = label_and_best_other(torch.ones(2, 2), weight, torch.tensor([0, 2]), 3)
    assert (label - other).tolist() == pytest.approx([0.0, -2.0])


def test_no_tokens_have_no_margins() -> None:
    hidden, weight, labels = case()
    assert [len(part) for part in label_and_best_other(hidden[:0], weight, labels[:0], VOCAB)] == [0, 0]


def _rank(rank: int, folder: str) -> None:
    for world, rows, group in shared_cases(rank, folder):
        hidden, weight, labels = case(rows=rows * world)
        share = weight[rank * rows : (rank + 1) * rows]
        torch.save(label_and_best_other(hidden, share, labels, VOCAB, group), f"{folder}/{world}-{rank}.pt")


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of three processes computes; they start once."""
    return run_ranks(_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world", "rows"), SHARED, ids=SHARED_IDS)
def test_over_ranks_they_are_those_of_the_whole_vocabulary(world: int, rows: int, over_ranks: Path) -> None:
    expected = brute_force(*case(rows=rows * world))
    for rank in range(world):
        for mine, true in zip(torch.load(over_ranks / f"{world}-{rank}.pt"), expected, strict=True):
            assert_within(mine, true)
