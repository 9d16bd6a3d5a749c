"""The distance of sorted distributions, against the cheapest assignment and against itself cut off."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ctpd_nemo.losses.uld import paired_rows, sorted_distance, truncated_distance

TOKENS = 6


def distributions(*sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(2 * torch.randn(TOKENS, size, dtype=torch.double)).softmax(-1) for size in sizes]


@pytest.mark.parametrize("sizes", [(9, 9), (9, 14), (14, 9)])
def test_distance_is_that_of_the_cheapest_assignment_of_words(sizes: tuple[int, int]) -> None:
    student, teacher = distributions(*sizes)
    width = max(sizes)
    for p, q, found in zip(student, teacher, sorted_distance(student, teacher), strict=True):
        p, q = (torch.nn.functional.pad(probs, (0, width - len(probs))) for probs in (p, q))
        cost = (p[:, None] - q[None]).abs()
        assert found == pytest.approx(float(cost[linear_sum_assignment(cost)].sum()), rel=1e-12)


@pytest.mark.parametrize("sizes", [(9, 14), (14, 9)])
def test_truncated_distance_grows_to_the_whole_one(sizes: tuple[int, int]) -> None:
    student, teacher = distributions(*sizes)
    whole, distances = sorted_distance(student, teacher), []
    for k in range(1, min(sizes) + 1):
        p, q = (probs.sort(descending=True).values[:, :k] for probs in (student, teacher))
        distances.append(truncated_distance(p, q, 1 - q.sum(-1)))
    steps = torch.stack(distances).diff(dim=0)
    assert (steps > -1e-12).all()
    assert (distances[0] < whole - 1e-3).any()
    torch.testing.assert_close(distances[-1], whole)


def test_tokens_are_paired_by_their_number_until_the_shorter_side_ends() -> None:
    found = paired_rows(torch.tensor([3, 0, 2, 1]), torch.tensor([2, 0, 4, 1]))
    assert found.tolist() == [0, 1, -1, 2, 3, 6]
