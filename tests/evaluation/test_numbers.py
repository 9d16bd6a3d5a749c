"""Calibration and lengths, against closed forms and numbers counted by hand."""

import math

import numpy as np
import pytest

from ctpd_nemo.evaluation.calibration import calibration
from ctpd_nemo.evaluation.lengths import length_statistics
from ctpd_nemo.evaluation.model import Generation


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    # sigma(ln 3) = 3/4: three of four preferences are right.
    found = calibration(np.array([math.log(3)] * 3 + [-math.log(3)]) / 0.1, beta=0.1)
    assert found.expected_calibration_error == pytest.approx(0, abs=1e-12)
    assert found.brier_score == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)


def test_errors_of_bins_are_weighted_by_their_pairs() -> None:
    # Confidences 0.75 (right, wrong, wrong) and 0.95 (right): |1/3 - 0.75| * 3/4 + |1 - 0.95| / 4.
    margins = np.array([math.log(3), -math.log(3), -math.log(3), math.log(19)])
    found = calibration(margins, beta=1.0, n_bins=5)
    assert found.expected_calibration_error == pytest.approx(0.75 * (0.75 - 1 / 3) + 0.25 * 0.05)
    assert [one.n for one in found.bins] == [0, 0, 3, 0, 1]
    squares = [0.25**2, 0.75**2, 0.75**2, 0.05**2]
    assert found.brier_score == pytest.approx(np.mean(squares))
    assert found.brier_score_standard_error == pytest.approx(np.std(squares, ddof=1) / 2)


def test_margins_beyond_every_exponent_and_none_at_all() -> None:
    found = calibration(np.array([1e6, -1e6]), beta=1.0)
    assert (found.expected_calibration_error, found.brier_score) == (0.5, 0.5)
    indifferent = calibration(np.zeros(3), beta=0.1)
    assert (indifferent.expected_calibration_error, indifferent.brier_score) == (0, 0.25)


def test_lengths_are_what_one_counts() -> None:
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4 again: one of five 4-grams is a repeat.
    found = length_statistics(
        [Generation("", [1, 2, 3, 4, 1, 2, 3, 4], True), Generation("", [5, 6], False), Generation("", [], True)]
    )
    assert (found.n, found.mean, found.median) == (3, 10 / 3, 2)
    assert found.mean_standard_error == pytest.approx(np.std([8, 2, 0], ddof=1) / math.sqrt(3))
    assert found.percentiles["75"] == 5
    assert found.ended == pytest.approx(2 / 3)
    assert found.repeated_4grams == 1 / 5
