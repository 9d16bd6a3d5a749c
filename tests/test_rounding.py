"""The bounds themselves: any order of a sum stays within them, and what is wrong does not."""

import pytest
import torch
from torch import Tensor

from tests.rounding import Rounded, assert_within, of_sum

N, M, K = 40, 30, 200


def factors() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=draw), torch.randn(K, M, generator=draw)


def one_after_the_other(a: Tensor, b: Tensor) -> Tensor:
    """The order with the largest error: each product added to the sum so far, rounded each time."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for at in torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(1)).tolist():
        total = total + a[:, at : at + 1] * b[at : at + 1]
    return total


def test_products_in_any_order_are_within_the_bound() -> None:
    a, b = factors()
    expected = Rounded.given(a) @ Rounded.given(b)
    assert_within(a @ b, expected)
    assert_within(one_after_the_other(a, b), expected)


def test_functions_of_them_are_within_the_bound() -> None:
    a, b = factors()
    logits, given = one_after_the_other(a, b) / 8, Rounded.given(a) @ Rounded.given(b) / 8
    assert_within(logits.log_softmax(-1), given.log_softmax())
    assert_within(logits.softmax(-1), given.softmax())
    assert_within(logits.exp().sum(-1).log(), given.exp().sum().log())
    assert_within((logits * logits).sum(-1).sqrt(), (given * given).sum().sqrt())
    assert_within(logits / (3 - logits.softmax(-1)), given / (3 - given.softmax()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: (a.bfloat16() @ b.bfloat16()).float(),
        lambda a, b: a[:, 1:] @ b[1:],
        lambda a, b: (a @ b) * (1 + 1e-4),
        lambda a, b: a @ b + 1e-3 * b[:1],
        lambda a, b: (a @ b).index_fill(0, torch.tensor([3]), torch.nan),
    ],
    ids=["bf16", "a term left out", "a factor", "a term too many", "no number"],
)
def test_what_is_wrong_is_not(wrong) -> None:
    a, b = factors()
    expected = Rounded.given(a) @ Rounded.given(b)
    with pytest.raises(AssertionError, match="where rounding explains"):
        assert_within(wrong(a, b), expected)
    with pytest.raises(AssertionError, match="where rounding explains"):
        assert_within(wrong(a, b).log_softmax(-1), expected.log_softmax())


def test_a_bound_that_shows_nothing_is_refused() -> None:
    large = Rounded(torch.ones(3, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64), 2**-24)
    with pytest.raises(AssertionError, match="shows nothing"):
        assert_within(torch.ones(3), large)


def test_sums_of_one_sign_are_off_by_a_unit_a_term() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert abs(float(values.cumsum(0)[-1]) / float(values.double().sum()) - 1) < of_sum(len(values))
