"""The clipped loss, token by token in Python numbers, and its gradient."""

import math
import random

import pytest
import torch

from ctpd_nemo.losses.clipped import Clipping, clipped_loss, engine_weights


def written_out(policy: float, old: float, advantage: float, bounds: Clipping) -> float:
    ratio = math.exp(policy - old)
    gain = min(ratio * advantage, min(max(ratio, 1 - bounds.low), 1 + bounds.high) * advantage)
    return -(max(gain, bounds.dual * advantage) if advantage < 0 else gain)


def drawn(count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = random.Random(1)
    old = torch.tensor([-draw.uniform(0, 5) for _ in range(count)], dtype=torch.float64)
    policy = old + torch.tensor([draw.gauss(0, 1.2) for _ in range(count)], dtype=torch.float64)
    advantages = torch.tensor([draw.gauss(0, 2) for _ in range(count)], dtype=torch.float64)
    counts = torch.tensor([draw.random() < 0.8 for _ in range(count)])
    return policy, old, advantages, counts


def test_loss_is_that_of_equation_10_token_by_token() -> None:
    policy, old, advantages, counts = drawn()
    found = clipped_loss(policy, old, advantages, counts, Clipping())
    rows = zip(policy.tolist(), old.tolist(), advantages.tolist(), counts.tolist(), strict=True)
    expected = [written_out(p, o, a, Clipping()) for p, o, a, counted in rows if counted]
    assert float(found.total) == pytest.approx(sum(expected), rel=1e-12)
    assert int(found.tokens) == len(expected)


def test_each_bound_is_reached_and_clipped_tokens_have_no_gradient() -> None:
    bounds = Clipping()
    #          inside, above with gain, below with loss, far above with loss (dual), above with loss, below with gain
    ratios = [1.1, 1.5, 0.5, 20.0, 1.5, 0.5]
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    policy = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    found = clipped_loss(policy, torch.zeros(6), advantages, torch.ones(6, dtype=torch.bool), bounds)
    assert found.total.item() == pytest.approx(-1.1 - 1.28 + 0.8 + 10.0 + 1.5 - 0.5)
    found.total.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-1.1, 0.0, 0.0, 0.0, 1.5, -0.5])
    assert int(found.clipped) == 3


def test_one_step_a_rollout_has_the_gradient_of_the_weighted_log_prob() -> None:
    policy, _, advantages, counts = drawn()
    policy.requires_grad_()
    clipped_loss(policy, policy.detach(), advantages, counts, Clipping()).total.backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, -advantages * counts, rtol=0, atol=0)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_a_token_that_does_not_count_is_in_no_sum_and_has_no_gradient(spoiled: float) -> None:
    policy, old, advantages, counts = drawn(10)
    engine = old - 0.1
    expected = clipped_loss(policy, old, advantages, counts, Clipping(), engine)
    for tensor in (policy, old, advantages, engine):
        tensor[~counts] = spoiled
    policy.requires_grad_()
    found = clipped_loss(policy, old, advantages, counts, Clipping(), engine)
    found.total.backward()
    assert torch.equal(found.total, expected.total)
    assert policy.grad is not None
    assert (policy.grad[~counts] == 0).all()


def test_all_masked_is_zero_over_zero_tokens_and_no_number_is_lost() -> None:
    policy, old, advantages, _ = drawn(5)
    found = clipped_loss(policy, old, advantages, torch.zeros(5, dtype=torch.bool), Clipping())
    assert (float(found.total), int(found.tokens)) == (0.0, 0)


def test_weights_between_engine_and_trainer_are_truncated_ratios() -> None:
    old, engine = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.5, -3.0, -0.5])
    counts = torch.tensor([True, True, False])
    weights = engine_weights(old, engine, counts, 2.0)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 2.0, 1.0])
    policy, advantages = old.clone(), torch.tensor([1.0, -2.0, 5.0])
    found = clipped_loss(policy, old, advantages, counts, Clipping(), engine)
    assert float(found.total) == pytest.approx(-math.exp(0.5) + 4.0)
