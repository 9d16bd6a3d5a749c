"""Whether a difference over seeds is one: Student's t for few values, and Holm's correction for many comparisons."""

import math
from collections.abc import Sequence

from scipy.special import stdtr, stdtrit

LEVEL = 0.95


def t_interval(mean: float, standard_error: float, n: int) -> tuple[float, float]:
    """Where the true mean of ``n`` normal values lies with a probability of ``LEVEL``.

    With four seeds that is 3.18 standard errors to either side, not two: of four values the error itself is uncertain.
    """
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * standard_error
    return mean - reach, mean + reach


def p_value(mean: float, standard_error: float, n: int) -> float:
    """Of a mean of ``n`` normal values, two-sided, if the true one were 0; ``mean`` is beyond the interval below 0.05.

    Of differences seed by seed this is the paired t-test.
    """
    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(n - 1, -math.fabs(mean / standard_error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Values that hold for all comparisons together (Holm 1979), in the order of ``p_values``.

    Where all those below 0.05 are called differences, one or more of them is none with a probability of at most 0.05.
    Below Bonferroni's ``len(p_values)`` times each, and as safe.
    """
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted
