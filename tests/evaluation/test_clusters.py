"""Standard errors over pairs that ask the same thing, against closed forms and a bootstrap."""

import numpy as np
import pytest
from scipy import stats

from ctpd_nemo.evaluation.calibration import calibration
from ctpd_nemo.evaluation.clusters import standard_error
from ctpd_nemo.evaluation.lengths import length_statistics
from ctpd_nemo.evaluation.model import Generation


def test_values_that_are_all_independent_have_the_usual_error() -> None:
    values = np.random.default_rng(0).standard_normal(37)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error(values, list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJK")) == pytest.approx(stats.sem(values))


@pytest.mark.parametrize("times", [1, 2, 17])
def test_asking_the_same_again_adds_no_certainty(times: int) -> None:
    values = np.random.default_rng(1).standard_normal(30)
    again = np.tile(values, times)
    assert standard_error(again, [*range(30)] * times) == pytest.approx(stats.sem(values))
    margins = calibration(again, 1.0, clusters=[*range(30)] * times)
    assert margins.brier_score_standard_error == pytest.approx(calibration(values, 1.0).brier_score_standard_error)
    answers = [Generation("", [0] * length, True) for length in range(1, 31)]
    lengths = length_statistics(answers * times, [*range(30)] * times)
    assert lengths.mean_standard_error == pytest.approx(stats.sem(np.arange(1, 31)))


def test_the_error_is_that_of_resampling_facts() -> None:
    """Facts of unequal numbers of questions whose answers go with the fact: questions alone say less than half."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 25, 80)
    facts = np.repeat(np.arange(80), sizes)
    values = (rng.random(len(facts)) < np.repeat(rng.beta(0.3, 0.3, 80), sizes)).astype(float)
    drawn = rng.integers(0, 80, (4000, 80))
    means = np.bincount(facts, values)[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert standard_error(values, facts.tolist()) == pytest.approx(np.std(means), rel=0.05)
    assert stats.sem(values) < 0.5 * np.std(means)


def test_pairs_that_all_ask_the_same_have_no_error_to_be_known() -> None:
    assert standard_error(np.array([1.0, 0.0]), ["same", "same"]) == 0
    assert standard_error(np.array([1.0])) == 0
