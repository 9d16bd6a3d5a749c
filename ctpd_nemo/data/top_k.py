"""What the teacher finds most likely at each of its response tokens, from a cache into the batches of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.errors import InputError

Float32Array = NDArray[np.float32]


class TopKSource(Protocol):
    """The largest log-probs of the teacher by pair: what the cache gives.

    Attributes:
        k: How many a token.
        fingerprint: A name for the content of all of them.
    """

    k: int
    fingerprint: str

    def lookup(self, pair: EncodedPair) -> tuple[Float32Array, Float32Array]:
        """Of the chosen response: log-probs in descending order f32 ``[n, k]``, probability of the others ``[n]``."""
        ...


@dataclass(eq=False)
class TopK:
    """The teacher's largest log-probs at the M response tokens of a microbatch of chosen responses.

    Attributes:
        top_MK: Log-probs in descending order, fp32 ``[M, K]``.
        tail_M: What the probabilities of all other words add up to, fp32 ``[M]``.
        lengths_R: The teacher's tokens of each response, int64 ``[R]``.
    """

    top_MK: Tensor
    tail_M: Tensor
    lengths_R: Tensor

    def pin_memory(self) -> "TopK":
        """A copy in page-locked memory."""
        return TopK(self.top_MK.pin_memory(), self.tail_M.pin_memory(), self.lengths_R.pin_memory())

    def to(self, device: torch.device | str) -> "TopK":
        """A copy on a device; from page-locked memory without waiting for it."""
        return TopK(*(part.to(device, non_blocking=True) for part in (self.top_MK, self.tail_M, self.lengths_R)))

    def first(self, k: int) -> "TopK":
        """The ``k`` largest only, the others added to the rest."""
        others_M = self.top_MK[:, k:].exp().sum(dim=1)
        return TopK(self.top_MK[:, :k], self.tail_M + others_M, self.lengths_R)


def build_top_k(pairs: Sequence[EncodedPair], source: TopKSource) -> TopK:
    """Look up the chosen responses of pairs, in the order of their microbatch.

    Raises:
        InputError: The log-probs of a pair are of another number of tokens.
    """
    tops, tails = [], []
    for pair in pairs:
        top, tail = source.lookup(pair)
        tokens = len(pair.chosen.reference.response_ids)
        if not len(top) == len(tail) == tokens:
            found = f"log-probs of {len(top)} tokens of the chosen response"
            raise InputError(f"top_k of pair {pair.id!r}", found, f"{tokens}, as the teacher reads it")
        tops.append(top)
        tails.append(tail)
    return TopK(
        torch.from_numpy(np.concatenate(tops)),
        torch.from_numpy(np.concatenate(tails)),
        torch.from_numpy(np.array([len(tail) for tail in tails], dtype=np.int64)),
    )
