"""How far rounding may move a result: bounds from what is added and multiplied, on any processor, in any order.

A sum of n numbers is off by at most n - 1 times the unit roundoff u times the sum of their sizes, whatever the order
and the instructions, a sum of n products by n times (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
edition, 4.2). ``Rounded`` carries such a bound beside each exact value, through the steps that a computation has
(running error analysis, 3.3 there), to first order in u. Such a bound still shows a term that is left out, a factor, or
a product in bf16: see ``test_rounding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Units in which an exponential, logarithm, root or quotient of any library is off.
_FUNCTION = 4.0
# First-order terms are all that is counted.
_ROOM = 1.01


def unit(dtype: torch.dtype = torch.float32) -> float:
    """The unit roundoff: how far one operation may be off, relative to its result."""
    return torch.finfo(dtype).eps / 2


def of_sum(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """How far a sum of products may be off, relative to the sum of their sizes; to itself where none is negative."""
    return _ROOM * terms * unit(dtype)


def of_long_sum(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The same of very many terms, where the bound says nothing any more: roundings are up as often as down.

    With a chance of failure of 1e-13 a sum (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis,
    SIAM J. Sci. Comput. 41, 2019, with lambda = 8).
    """
    return _ROOM * 8 * terms**0.5 * unit(dtype)


def of_model(layers: int, widest: int, dtype: torch.dtype = torch.float32) -> float:
    """How far results of a model may be off, relative to their norm: log-probs, a loss, a whole gradient.

    A pass forward and one back, each through so many layers, whose products are sums of up to ``widest`` terms. This is
    a rule and no proof, as layers can magnify what is off: ten times what is seen, and a hundredth of any fault.
    """
    return of_sum(2 * layers * widest, dtype)


@dataclass(frozen=True)
class Rounded:
    """Values as they are exactly, and how far those of a computation may be from them.

    Attributes:
        exact: In fp64.
        error: The bound, of the same shape.
        unit: The unit roundoff of the computation.
    """

    exact: Tensor
    error: Tensor
    unit: float

    @classmethod
    def given(cls, values: Tensor, dtype: torch.dtype = torch.float32) -> Rounded:
        """What the computation starts from; it is in ``dtype``."""
        exact = values.detach().double()
        return cls(exact, torch.zeros_like(exact), unit(dtype))

    def _made(self, exact: Tensor, error: Tensor, operations: float | Tensor = 1.0) -> Rounded:
        return Rounded(exact, error + operations * self.unit * exact.abs(), self.unit)

    def _of(self, other: Any) -> Rounded:
        if isinstance(other, Rounded):
            return other
        exact = torch.as_tensor(other, dtype=torch.float64)
        return Rounded(exact, torch.zeros_like(exact), self.unit)

    def __matmul__(self, other: Rounded) -> Rounded:
        terms, sizes = self.exact.shape[-1], self.exact.abs() @ other.exact.abs()
        moved = self.error @ other.exact.abs() + self.exact.abs() @ other.error
        return Rounded(self.exact @ other.exact, moved + terms * self.unit * sizes, self.unit)

    def __add__(self, other: Any) -> Rounded:
        other = self._of(other)
        return self._made(self.exact + other.exact, self.error + other.error)

    def __neg__(self) -> Rounded:
        return Rounded(-self.exact, self.error, self.unit)

    def __sub__(self, other: Any) -> Rounded:
        return self + -self._of(other)

    def __mul__(self, other: Any) -> Rounded:
        other = self._of(other)
        moved = self.error * other.exact.abs() + self.exact.abs() * other.error
        return self._made(self.exact * other.exact, moved)

    def __truediv__(self, other: Any) -> Rounded:
        other = self._of(other)
        exact = self.exact / other.exact
        return self._made(exact, (self.error + exact.abs() * other.error) / other.exact.abs(), _FUNCTION)

    def __rsub__(self, other: Any) -> Rounded:
        return self._of(other) - self

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, key: Any) -> Rounded:
        return Rounded(self.exact[key], self.error[key], self.unit)

    def __getattr__(self, name: str) -> Any:
        """What only moves values: ``T``, ``gather``, ``flatten``, ``reshape``, ..."""
        if name.startswith("_"):
            raise AttributeError(name)
        moved = getattr(self.exact, name), getattr(self.error, name)
        if isinstance(moved[0], Tensor):
            return Rounded(*moved, self.unit)
        return lambda *given, **named: Rounded(*(move(*given, **named) for move in moved), self.unit)

    def sum(self, dim: int = -1, keepdim: bool = False) -> Rounded:
        """Of so many numbers, in any order."""
        terms, sizes = self.exact.shape[dim], self.exact.abs().sum(dim, keepdim)
        error = self.error.sum(dim, keepdim) + terms * self.unit * sizes
        return Rounded(self.exact.sum(dim, keepdim=keepdim), error, self.unit)

    def exp(self) -> Rounded:
        """Relative errors are the absolute ones of the exponents."""
        exact = self.exact.exp()
        return self._made(exact, exact * self.error, _FUNCTION)

    def log(self) -> Rounded:
        """Absolute errors are the relative ones of the arguments."""
        return self._made(self.exact.log(), self.error / self.exact, _FUNCTION)

    def sqrt(self) -> Rounded:
        """Half of the relative errors."""
        exact = self.exact.sqrt()
        return self._made(exact, self.error / (2 * exact), _FUNCTION)

    def logsumexp(self) -> Rounded:
        """Over the last dimension, the largest taken off first; where there is minus infinity is nothing."""
        exact, largest = self.exact.logsumexp(-1), self.exact.max(-1).values
        share = self.exact.softmax(-1)
        spread = torch.where(share > 0, (self.exact - largest[..., None]).abs(), 0)
        # Each exponent is off by its own error and by the rounding of the difference; the sum adds a unit a term.
        error = (share * (self.error + self.unit * (spread + _FUNCTION))).sum(-1)
        error = error + self.unit * (self.exact.shape[-1] + _FUNCTION + largest.abs())
        return self._made(exact, error, _FUNCTION)

    def log_softmax(self) -> Rounded:
        """Over the last dimension."""
        return self - self.logsumexp()[..., None]

    def softmax(self) -> Rounded:
        """Over the last dimension; where there is minus infinity is zero."""
        exact, total = self.exact.softmax(-1), self.logsumexp()
        below = torch.where(exact > 0, (self.exact - total.exact[..., None]).abs(), 0)
        return self._made(exact, exact * (self.error + total.error[..., None] + self.unit * below), _FUNCTION)


def assert_within(found: Tensor, expected: Rounded, is_zero: bool = False) -> None:
    """Each value is as near the exact one as rounding leaves it.

    Args:
        found: What was computed.
        expected: What it should be.
        is_zero: Whether all of it is exactly zero, and rounding is all that there can be.

    Raises:
        AssertionError: One is not, or the bound shows nothing: it is more than a hundredth of the largest value.
    """
    off, bound = (found.detach().double() - expected.exact).abs(), _ROOM * expected.error
    assert found.shape == expected.exact.shape
    assert is_zero or bound.max() <= 0.01 * expected.exact.abs().max(), f"a bound of {bound.max():.1e} shows nothing"
    worst = torch.nan_to_num(off - bound, nan=torch.inf)
    if bool((worst > 0).any()):
        at = int(worst.argmax())
        raise AssertionError(
            f"off by {float(off.flatten()[at]):.2e} where rounding explains {float(bound.flatten()[at]):.2e}, "
            f"of {float(expected.exact.flatten()[at]):.4g}; in {int((worst > 0).sum())} of {worst.numel()} places"
        )
