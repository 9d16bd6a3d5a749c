"""What a sequence costs to compute, so that work can be shared out evenly."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Costs are whole numbers of this fraction of a token: sums of them are exact, so all ranks see the same ones.
_UNIT = 1024


@dataclass(frozen=True)
class SequenceCost:
    """The cost of sequences of a model, in tokens: one is what its layers' matrices take for one token.

    A sequence of ``L`` tokens, ``R`` of them of the response, costs ``L + head * R + attention * A(L)``, where ``A`` is
    how many pairs of a query and a key its causal attention has: ``L (L + 1) / 2``, or with a sliding window of ``w``
    tokens ``w (w + 1) / 2 + (L - w) w`` for ``L > w``; the mean over the layers where only some have the window. The
    parts of one model: ``models.cost.sequence_cost``.

    Attributes:
        attention: Cost of a pair of a query and a key.
        head: Cost of the output layer at a token of the response.
        window: Tokens that each token sees, itself included; ``None`` for all before it.
        full_share: Share of the layers in which it sees all in spite of the window.
    """

    attention: float = 0.0
    head: float = 0.0
    window: int | None = None
    full_share: float = 0.0

    def query_key_pairs(self, lengths: ArrayLike) -> NDArray[np.int64]:
        """``A`` of each length, int64 of the same shape."""
        lengths = np.asarray(lengths, dtype=np.int64)
        seen = lengths if self.window is None else np.minimum(lengths, self.window)
        windowed = seen * (seen + 1) // 2 + (lengths - seen) * seen
        if not self.full_share:
            return windowed
        hidden = lengths * (lengths + 1) // 2 - windowed
        return windowed + np.rint(self.full_share * hidden).astype(np.int64)

    def of(self, lengths: ArrayLike, response_lengths: ArrayLike) -> NDArray[np.int64]:
        """The cost of each sequence in 1/1024 of a token, int64 of the shape of both arguments."""
        tokens = np.asarray(lengths, dtype=np.int64) + self.head * np.asarray(response_lengths, dtype=np.int64)
        return np.rint(_UNIT * (tokens + self.attention * self.query_key_pairs(lengths))).astype(np.int64)
