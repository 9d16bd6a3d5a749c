"""Sinkhorn's plan against the cheapest assignment; the token level against sums written out."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ctpd_nemo.losses.optimal_transport import (
    absolute_difference,
    logarithmic_cost,
    sinkhorn_distance,
    transport_plan,
)


def test_little_entropy_finds_the_cheapest_assignment() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(7, 4, dtype=torch.double), torch.rand(7, 4, dtype=torch.double)
    cost = torch.cdist(student, teacher, p=1)
    cheapest = float(cost[linear_sum_assignment(cost)].sum())
    assert float(sinkhorn_distance(student, teacher, 0.01, 500)) == pytest.approx(cheapest, rel=1e-3)
    assert float(sinkhorn_distance(student, teacher, 10.0, 500)) > 1.05 * cheapest


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 8), (8, 3)])
def test_rows_have_a_mass_of_one_and_columns_share_it(n: int, m: int) -> None:
    torch.manual_seed(0)
    plan = transport_plan(torch.rand(n, m, dtype=torch.double), 0.2, 200)
    torch.testing.assert_close(plan.sum(0), torch.full((m,), n / m, dtype=torch.double))
    # As near as the iterations have come.
    torch.testing.assert_close(plan.sum(1), torch.ones(n, dtype=torch.double), rtol=1e-4, atol=1e-4)


def test_gradients_go_through_the_iterations() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(4, 3, dtype=torch.double, requires_grad=True), torch.rand(5, 3, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda values: sinkhorn_distance(values, teacher, 0.3, 5), student)


def test_token_level_costs_written_out() -> None:
    student, teacher = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.75, 0.125]])
    assert absolute_difference(student, teacher).tolist() == [0.375]
    expected = -(0.75 * torch.tensor(0.5).log() + 0.125 * torch.tensor(0.25).log())
    torch.testing.assert_close(logarithmic_cost(student.log(), teacher), expected[None])
