"""The tokens of context-parallel ranks: against a plain enumeration, and span sums put together from their shares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_nemo.losses.preference import preference_loss
from ctpd_nemo.losses.spans import sum_by
from ctpd_nemo.parallel.context import held_tokens, order_of_all


def enumerated(lengths: list[int], size: int, rank: int) -> list[int]:
    """Every sequence cut into ``2 * size`` equal runs; run ``rank`` from the front, then run ``rank`` from the back."""
    tokens, begin = [], 0
    for length in lengths:
        runs = np.array_split(np.arange(begin, begin + length), 2 * size)
        tokens += [*runs[rank], *runs[-1 - rank]]
        begin += length
    return [int(token) for token in tokens]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], int]:
    size = draw(st.integers(1, 5))
    parts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    return [2 * size * part for part in parts], size


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_each_rank_holds_one_early_and_one_late_part_of_every_sequence(layout: tuple[list[int], int]) -> None:
    lengths, size = layout
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    held = [held_tokens(cu_seqlens, sum(lengths), size, rank) for rank in range(size)]
    assert [tokens.tolist() for tokens in held] == [enumerated(lengths, size, rank) for rank in range(size)]
    whole = torch.arange(sum(lengths))
    assert torch.equal(torch.cat(held)[order_of_all(cu_seqlens, sum(lengths), size)], whole)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_of_spans_and_their_gradients_come_together_from_the_shares_of_the_ranks(size: int) -> None:
    """As the group's all-reduce adds them up: every rank sums its tokens, and all see one loss of the total."""
    draw = torch.Generator().manual_seed(size)
    lengths = [2 * size * part for part in (4, 3, 5, 2)]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    # Spans of one to three tokens over all four responses; runs of a rank begin and end in the middle of spans.
    span_T = torch.randint(1, 4, (sum(lengths),), generator=draw).cumsum(0) // 3
    spans = int(span_T[-1]) + 1
    response_S = torch.zeros(spans, dtype=torch.int64).index_copy(
        0, span_T, torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    )
    logprob_T = -torch.rand(sum(lengths), generator=draw, dtype=torch.double)
    weights_S, reference_S = (torch.rand(spans, generator=draw, dtype=torch.double) for _ in range(2))
    ends = torch.tensor([0, 2]), torch.tensor([1, 3])

    def loss(policy_S: torch.Tensor) -> torch.Tensor:
        return preference_loss(policy_S, -reference_S, weights_S, response_S, *ends, beta=0.3).total

    whole_T = logprob_T.clone().requires_grad_()
    expected = loss(sum_by(whole_T, span_T, spans))
    expected.backward()

    shares = [logprob_T[held_tokens(cu_seqlens, sum(lengths), size, rank)].requires_grad_() for rank in range(size)]
    parts = [
        sum_by(share, span_T[held_tokens(cu_seqlens, sum(lengths), size, rank)], spans)
        for rank, share in enumerate(shares)
    ]
    total_S = torch.stack([part.detach() for part in parts]).sum(0)
    gradient_T = torch.zeros_like(logprob_T)
    for rank in range(size):
        # What the group's sum does: forward gives the total, backward hands the gradient on to this rank's part.
        seen_S = parts[rank] + (total_S - parts[rank].detach())
        found = loss(seen_S)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        found.backward()
        gradient_T[held_tokens(cu_seqlens, sum(lengths), size, rank)] = shares[rank].grad
    torch.testing.assert_close(gradient_T, whole_T.grad, rtol=1e-12, atol=1e-12)
