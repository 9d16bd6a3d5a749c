"""Weightings against their closed forms, span by span in Python numbers."""

import math
import statistics
from collections import Counter

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses.weights import (
    average_weights,
    constant_weights,
    draw,
    exponential_weights,
    shuffled_weights,
)

# Spans of the responses, one of a single span.
SPANS = (3, 1, 4, 6)


def case() -> tuple[Tensor, Tensor]:
    """Weights that are all different, and the response of each span."""
    response = torch.tensor([number for number, spans in enumerate(SPANS) for _ in range(spans)])
    return torch.arange(1.0, len(response) + 1).sqrt(), response


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "clamped"), [(-3.0, -0.5), (-0.5, -0.5), (0.0, 0.0), (0.7, 0.7), (9.0, 1.5)])
def test_a_weight_is_the_exponential_of_the_clamped_ratio(sign: float, ratio: float, clamped: float) -> None:
    weight = exponential_weights(torch.tensor([ratio], dtype=torch.float64), sign, scale=1.7)
    assert float(weight) == pytest.approx(1.7 * math.exp(sign * clamped), rel=1e-12)


def test_signs_can_be_given_span_by_span() -> None:
    weights = exponential_weights(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([1.0, -1.0, -1.0]), 1.0, -2.0, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-2.0)], rel=1e-6)


def test_an_average_weight_is_the_weight_divided_by_the_length() -> None:
    weights, _ = case()
    lengths = torch.arange(len(weights)) % 3 + 1
    expected = [w / n for w, n in zip(weights.tolist(), lengths.tolist(), strict=True)]
    assert average_weights(weights, lengths).tolist() == pytest.approx(expected, rel=1e-7)


def test_constant_weights_are_the_mean_of_their_response() -> None:
    weights, response = case()
    expected = [statistics.mean(weights[response == at].tolist()) for at in response.tolist()]
    assert constant_weights(weights, response, len(SPANS)).tolist() == pytest.approx(expected, rel=1e-6)


def test_shuffled_weights_are_the_same_in_each_response_in_the_order_of_its_numbers() -> None:
    weights, response = case()
    numbers = torch.rand(len(weights), generator=torch.Generator().manual_seed(1))
    found = shuffled_weights(weights, numbers, response)
    for at in range(len(SPANS)):
        own = response == at
        ordered = sorted(zip(numbers[own].tolist(), weights[own].tolist(), strict=True))
        assert found[own].tolist() == [weight for _, weight in ordered]
    assert not found.equal(weights)


def test_every_order_of_a_response_is_as_likely_as_any_other() -> None:
    response, weights = torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 2.0, 3.0])
    seen = Counter(
        tuple(shuffled_weights(weights, draw(0, f"pair-{number}", "chosen", 3), response).tolist())
        for number in range(1200)
    )
    assert len(seen) == 6
    # 200 each; five standard deviations of a binomial are 65.
    assert all(abs(count - 200) < 65 for count in seen.values())


def test_no_spans_have_no_weights() -> None:
    none, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert len(constant_weights(none, nowhere, 0)) == len(shuffled_weights(none, none, nowhere)) == 0
    assert len(draw(0, "pair", "chosen", 0)) == 0


def test_draws_are_uniform_between_minus_one_and_one() -> None:
    drawn = torch.cat([draw(0, f"pair-{number}", "chosen", 50) for number in range(200)])
    assert drawn.dtype == torch.float32
    assert -1 < float(drawn.min()) < -0.99
    assert 0.99 < float(drawn.max()) < 1
    counts = torch.histc(drawn, 10, -1, 1)
    # 1,000 each; five standard deviations are 150.
    assert (counts - 1000).abs().max() < 150


def test_draws_depend_on_seed_pair_and_response_and_on_nothing_else() -> None:
    every = [("7", 0, "chosen"), ("7", 1, "chosen"), ("8", 0, "chosen"), ("7", 0, "rejected"), ("07", 0, "chosen")]
    drawn = [draw(seed, pair, response, 20) for pair, seed, response in every]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(every)
    torch.manual_seed(5)
    assert drawn[0].equal(draw(0, "7", "chosen", 20))
    assert drawn[0][:5].equal(draw(0, "7", "chosen", 5)), "a response that is cut keeps the draws of what is left"


def test_draws_are_those_of_every_other_day() -> None:
    """A run that goes on elsewhere, with other versions of libraries, must draw the same."""
    expected = [-0.8768697381019592, 0.3446992039680481, -0.39005357027053833]
    assert draw(0, "pair-0", "chosen", 3).tolist() == expected
