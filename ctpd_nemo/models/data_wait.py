"""How much of training is waiting for data."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ctpd_nemo.parallel.layout import local_device


@dataclass
class DataWait:
    """Waiting for data over the steps of one process, as long as the rank of the job that waits longest.

    Attributes:
        starting: The first so many steps hold the start of the workers, one each; they count for nothing else.
        first_seconds: Of the first of them.
        seconds: Of all later steps.
        step_seconds: What those steps took, waiting included.
        steps: Steps so far.
    """

    starting: int = 1
    first_seconds: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0

    def add(self, own_seconds: float, work_seconds: float) -> float:
        """Count a step; every rank of the job calls it together.

        Args:
            own_seconds: How long this rank waited.
            work_seconds: How long its step took then.

        Returns:
            How long the rank waited that waited longest; the others waited for it in their step.
        """
        longest = torch.tensor(own_seconds, dtype=torch.float64, device=local_device())
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        waited = longest.item()
        self.steps += 1
        if self.steps == 1:
            self.first_seconds = waited
        if self.steps > self.starting:
            self.seconds += waited
            self.step_seconds += own_seconds + work_seconds
        return waited

    @property
    def share(self) -> float:
        """Waiting as a share of step time, once all workers have started; 0 before."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0
