"""Weights made of a pair's cached scores, and of a microbatch's as training goes, are the same numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch, build_microbatch
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.models.roles import ROLES, by_model
from ctpd_nemo.models.weighting import WEIGHTINGS, SpanDraws, Spans, Weighting

SEED = 7


def make_pairs() -> list[EncodedPair]:
    """Responses of 1 to 9 spans, each of 1 to 4 tokens on either side."""
    draw = np.random.default_rng(0)

    def side(n_spans: int) -> SideTokens:
        span = np.arange(n_spans, dtype=np.int32).repeat(draw.integers(1, 5, n_spans))
        return SideTokens(np.ones(2, np.int32), np.ones(len(span), np.int32), span)

    def response() -> EncodedResponse:
        n_spans = int(draw.integers(1, 10))
        return EncodedResponse(side(n_spans), side(n_spans), np.arange(n_spans + 1), n_spans, truncated=False)

    return [EncodedPair(number, f"pair-{number}", response(), response()) for number in range(6)]


PAIRS = make_pairs()


def scores_of(pair: EncodedPair) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(pair.index)
    return {
        role: tuple(-draw.gamma(2.0, size=n.n_spans).astype(np.float32) for n in (pair.chosen, pair.rejected))
        for role in ROLES
    }


def microbatches(pairs: list[EncodedPair]) -> tuple[Microbatch, Microbatch]:
    return (
        build_microbatch(pairs, pad_token_id=0, scores=SpanDraws(SEED)),
        build_microbatch(pairs, pad_token_id=0, side="reference"),
    )


def beside(weighting: Weighting, pairs: list[EncodedPair]) -> Tensor:
    """The weights of a microbatch of some pairs."""
    scored = [scores_of(pair) for pair in pairs]
    scores = {
        role: torch.from_numpy(np.concatenate([part for pair in scored for part in pair[role]])) for role in ROLES
    }
    return weighting.weights(scores, Spans.of_microbatch(*microbatches(pairs)))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_cached_pairs_and_microbatches_of_any_make_get_the_same_weights(name: str) -> None:
    weighting = Weighting(name, scale=1.3, lower=-0.4, upper=0.9, seed=SEED)
    expected = [torch.from_numpy(np.concatenate(weighting.pair_weights(scores_of(pair), pair))) for pair in PAIRS]
    for pairs in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        found = beside(weighting, [PAIRS[number] for number in pairs])
        torch.testing.assert_close(found, torch.cat([expected[number] for number in pairs]))


def test_lengths_are_tokens_of_the_reference() -> None:
    spans = Spans.of_microbatch(*microbatches(PAIRS))
    responses = [response for pair in PAIRS for response in (pair.chosen, pair.rejected)]
    expected = [(one.reference.response_span == span).sum() for one in responses for span in range(one.n_spans)]
    assert spans.length_S.tolist() == expected
    own = [(one.policy.response_span == span).sum() for one in responses for span in range(one.n_spans)]
    assert expected != own


def test_another_seed_draws_other_weights_and_moves_no_others() -> None:
    pair = PAIRS[0]
    changed = {
        name
        for name in WEIGHTINGS
        if not np.array_equal(
            *(np.concatenate(Weighting(name, seed=seed).pair_weights(scores_of(pair), pair)) for seed in (0, 1))
        )
    }
    assert changed == {"random", "shuffled"}


def test_a_filler_has_no_weights() -> None:
    filler = Microbatch.filler(4, pad_token_id=0)
    nothing = dict.fromkeys(ROLES, torch.zeros(0))
    for name in WEIGHTINGS:
        assert len(Weighting(name).weights(nothing, Spans.of_microbatch(filler, filler))) == 0


def test_a_model_with_two_roles_is_one_model() -> None:
    assert by_model(["student", "margin", "reference"]) == {
        "reference": ["reference", "margin"],
        "student": ["student"],
    }
    assert by_model(["margin"]) == {"reference": ["margin"]}
