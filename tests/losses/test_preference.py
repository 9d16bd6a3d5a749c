"""The preference loss against its formula, written out pair by pair in Python numbers."""

import math
import random

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses.preference import preference_loss
from ctpd_nemo.losses.spans import sum_by
from tests.rounding import of_sum

# Spans of 3 pairs, responses of a pair not side by side: 0 against 3, 4 against 1, 2 against 5.
SPANS = (3, 1, 4, 2, 5, 1)
CHOSEN, REJECTED = (0, 4, 2), (3, 1, 5)
BETA = 0.1


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference, weights and response of each span."""
    draw = random.Random(3)
    response = torch.tensor([number for number, spans in enumerate(SPANS) for _ in range(spans)])
    policy, reference = (torch.tensor([-draw.uniform(0, 20) for _ in response], dtype=dtype) for _ in range(2))
    weights = torch.tensor([draw.uniform(0.2, 4.5) for _ in response], dtype=dtype)
    return policy, reference, weights, response


def written_out(policy: Tensor, reference: Tensor, weights: Tensor, response: Tensor) -> list[dict[str, float]]:
    rows = []
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        reward = {chosen: 0.0, rejected: 0.0}
        for p, r, w, at in zip(*(x.tolist() for x in (policy, reference, weights, response)), strict=True):
            if at in reward:
                reward[at] += BETA * w * (p - r)
        margin = reward[chosen] - reward[rejected]
        rows.append({"chosen": reward[chosen], "rejected": reward[rejected], "margin": margin})
        rows[-1]["loss"] = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
    return rows


def loss_of(policy: Tensor, reference: Tensor, weights: Tensor, response: Tensor):
    return preference_loss(policy, reference, weights, response, torch.tensor(CHOSEN), torch.tensor(REJECTED), BETA)


def test_loss_margins_and_rewards_are_those_of_the_formula() -> None:
    loss, rows = loss_of(*case()), written_out(*case())
    assert loss.pair.tolist() == pytest.approx([row["loss"] for row in rows], rel=1e-12)
    assert float(loss.total) == pytest.approx(sum(row["loss"] for row in rows), rel=1e-12)
    assert loss.margin.tolist() == pytest.approx([row["margin"] for row in rows], rel=1e-12)
    assert loss.chosen_reward.tolist() == pytest.approx([row["chosen"] for row in rows], rel=1e-12)
    assert loss.rejected_reward.tolist() == pytest.approx([row["rejected"] for row in rows], rel=1e-12)


def test_gradient_of_a_span_is_its_weight_times_the_slope_of_its_pair() -> None:
    policy, *rest = case()
    policy.requires_grad_()
    loss_of(policy, *rest).total.backward()
    expected = torch.zeros_like(policy)
    for row, chosen, rejected in zip(written_out(policy, *rest), CHOSEN, REJECTED, strict=True):
        slope = -BETA / (1 + math.exp(row["margin"]))
        weights, response = rest[1], rest[2]
        expected += slope * weights * ((response == chosen).double() - (response == rejected).double())
    torch.testing.assert_close(policy.grad, expected, rtol=1e-12, atol=1e-15)


def test_gradcheck_of_the_policy() -> None:
    policy, *rest = case()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, *rest).total, policy.requires_grad_())


def test_what_is_reported_carries_no_gradient() -> None:
    policy, *rest = case()
    loss = loss_of(policy.requires_grad_(), *rest)
    assert loss.total.requires_grad
    assert not any(getattr(loss, name).requires_grad for name in ("pair", "margin", "chosen_reward", "rejected_reward"))


def test_loss_is_ln_2_and_margin_zero_where_the_policy_is_the_reference() -> None:
    policy, _, weights, response = case(torch.float32)
    loss = loss_of(policy * 100, policy * 100, weights, response)
    assert loss.margin.tolist() == [0, 0, 0]
    assert loss.pair.tolist() == pytest.approx([math.log(2)] * 3, rel=of_sum(4))


def test_unit_weights_make_it_dpo_on_whole_responses() -> None:
    policy, reference, weights, response = case()
    loss = loss_of(policy, reference, torch.ones_like(weights), response)
    ratio = [float((policy - reference)[response == number].sum()) for number in range(6)]
    dpo = [-math.log(1 / (1 + math.exp(-BETA * (ratio[c] - ratio[r])))) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert loss.pair.tolist() == pytest.approx(dpo, rel=1e-10)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin: float) -> None:
    policy = torch.tensor([margin / BETA, 0.0], requires_grad=True)
    zeros, ones = torch.zeros(2), torch.ones(2)
    loss = preference_loss(policy, zeros, ones, torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]), BETA)
    loss.total.backward()
    assert float(loss.total) == pytest.approx(max(-margin, 0.0))
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_no_pairs_cost_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    policy = torch.zeros(0, requires_grad=True)
    loss = preference_loss(policy, torch.zeros(0), torch.zeros(0), none, none, none, BETA)
    loss.total.backward()
    assert float(loss.total) == 0


def test_sum_by_adds_what_shares_an_index_in_any_order() -> None:
    values, index = [1.5, -2.0, 4.0, 8.0, 0.25], [3, 0, 3, 1, 0]
    found = sum_by(torch.tensor(values), torch.tensor(index), 5)
    assert found.tolist() == [sum(v for v, i in zip(values, index, strict=True) if i == at) for at in range(5)]


def test_gradcheck_of_sum_by() -> None:
    index = torch.tensor([2, 0, 2, 1])
    values = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sum_by(x, index, 4) ** 2, values)


def test_sum_by_of_nothing_is_zero() -> None:
    assert sum_by(torch.zeros(0), torch.zeros(0, dtype=torch.long), 3).tolist() == [0, 0, 0]
