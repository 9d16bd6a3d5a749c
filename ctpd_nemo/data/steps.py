"""Which pairs an optimizer step sees: a pure function of the step, so that a run can be put back anywhere."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError


@dataclass(frozen=True)
class StepPlan:
    """The global batch of every step; the last of an epoch may be a smaller one.

    Attributes:
        n_pairs: Pairs in the dataset.
        global_batch_size: Pairs a step, over all data-parallel ranks.
        epochs: Times that the dataset is gone through.
        max_steps: Stop after so many steps; ``None`` for all of them.
        shuffle: Whether every epoch has an order of its own, else pairs come in file order.
        seed: Chooses the orders.
    """

    n_pairs: int
    global_batch_size: int
    epochs: int = 1
    max_steps: int | None = None
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        keys = {"n_pairs": "data.train", "global_batch_size": "data.global_batch_size", "epochs": "trainer.epochs"}
        for name, key in keys.items():
            if getattr(self, name) < 1:
                raise InputError(key, f"{getattr(self, name)} {name}", "1 or more")

    @classmethod
    def in_order(cls, n_pairs: int, global_batch_size: int) -> "StepPlan":
        """Every pair once, in file order: for evaluation and scoring."""
        return cls(n_pairs, global_batch_size, shuffle=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return -(-self.n_pairs // self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batch(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step, and the rows of its pairs, int64 ``[n]``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.n_pairs, self.seed, epoch) if self.shuffle else np.arange(self.n_pairs)
        return epoch, order[within * self.global_batch_size : (within + 1) * self.global_batch_size]


@lru_cache(maxsize=2)
def epoch_order(n_pairs: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``range(n_pairs)``, int64, that is a function of its arguments alone."""
    # NumPy promises the raw stream of a bit generator across its versions, but not what ``permutation`` makes of it.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n_pairs)
    return np.argsort(keys, kind="stable")
