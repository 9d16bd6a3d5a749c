"""How the cost of a run grows with GPUs, where it stops paying, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from ctpd_nemo.planner.estimate import Estimate
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.jobs import Job
from ctpd_nemo.planner.search import best_layout, fewest_gpus
from ctpd_nemo.planner.workload import Lengths

# Twice the GPUs pay where the job is at least this many times as fast: its GPU-hours then grow by half at most.
PAYS = 4 / 3
# Reasons below this share of the time are not worth a word.
_WORTH_A_WORD = 0.08


@dataclass(frozen=True)
class StageStudy:
    """One stage on several numbers of GPUs.

    Attributes:
        job: The stage.
        found: The best layout of each number asked for; ``None`` where nothing fits.
        least: The best layout on the fewest GPUs that it fits on, of one node or whole nodes; ``None``: not found.
        stop: Where doubling stops paying, counted from ``least``.
        beyond: The double of that, which does not pay; ``None`` where it is not on the way to the largest number.
    """

    job: Job
    found: dict[int, Estimate | None]
    least: Estimate | None
    stop: Estimate | None
    beyond: Estimate | None

    @property
    def cheapest(self) -> float:
        """The fewest GPU-hours of all numbers of GPUs that were looked at."""
        looked_at = [*self.found.values(), self.least, self.stop]
        return min((one.gpu_hours for one in looked_at if one is not None), default=0.0)


class Study:
    """The best layouts of jobs on numbers of GPUs; stages that cost the same are searched once."""

    def __init__(self, hardware: Hardware, lengths: Lengths) -> None:
        self.hardware = hardware
        self.lengths = lengths
        self._best: dict[tuple[str, int], Estimate | None] = {}

    def best(self, job: Job, gpus: int) -> Estimate | None:
        """The fastest layout, as ``best_layout``."""
        key = (repr(job.alike()), gpus)
        if key not in self._best:
            self._best[key] = best_layout(job, gpus, self.hardware, self.lengths)
        return self._best[key]

    def least(self, job: Job) -> Estimate | None:
        """The best layout on the fewest GPUs."""
        key = (repr(job.alike()), 0)
        if key not in self._best:
            self._best[key] = fewest_gpus(job, 0, self.hardware, self.lengths)
        return self._best[key]

    def stage(self, job: Job, sizes: Sequence[int]) -> StageStudy:
        """A stage on every number of GPUs, and between them where it stops paying."""
        found = {gpus: self.best(job, gpus) for gpus in sizes}
        least = self.least(job)
        stop, beyond = least, None
        while stop is not None and 2 * stop.layout.gpus <= max(sizes):
            doubled = self.best(job, 2 * stop.layout.gpus)
            if doubled is None or stop.hours < PAYS * doubled.hours:
                beyond = doubled
                break
            stop = doubled
        return StageStudy(job, found, least, stop, beyond)


def reasons(found: Estimate) -> list[str]:
    """What the time goes to beside the model's own operations, largest share first, in words with their numbers."""
    start = found.start_seconds / (3600 * found.hours)
    shares = {name: (1 - start) * share for name, share in found.parts.shares().items()} | {"start": start}
    wasted = sorted((name for name in shares if name != "compute"), key=lambda name: -shares[name])
    return [f"{shares[name]:.0%} {_word(name, found)}" for name in wasted if shares[name] >= _WORTH_A_WORD]


def _word(name: str, found: Estimate) -> str:
    parallel, pairs = found.layout.parallel, found.job.pairs
    words = {
        "recompute": "making activations again",
        "elementwise": "norms, log-probs and starting kernels",
        "tensor": f"sums over {parallel.tensor} tensor-parallel GPUs",
        "context": f"keys and values over {parallel.context} context-parallel GPUs",
        "transfer": f"sends between {parallel.pipeline} stages",
        "bubble": f"pipeline bubble: {pairs} pairs make {found.microbatches:.1f} microbatches a rank, "
        f"for {parallel.pipeline} stages",
        "waiting": _waiting(found),
        "data": f"gradients and weights over {found.layout.replicas} GPUs that hold the same",
        "update": "the optimizer",
        "start": "starting and reading weights",
        "fixed": f"fixed cost of a step of {pairs} pairs",
    }
    return words[name]


def _waiting(found: Estimate) -> str:
    ranks, busy = found.layout.data_ranks, found.busy_ranks
    if found.job.method == "score":
        return f"idle replicas in the last of {found.steps} rounds of shards"
    if busy < 0.99 * ranks:
        return f"idle: {found.job.pairs} pairs a step leave {ranks - busy:.0f} of {ranks} data-parallel ranks without"
    return f"waiting for the longest pairs: {found.job.pairs} a step over {ranks} ranks"


def verdict(study: StageStudy) -> str:
    """Where a stage stops paying, and why, in a sentence or two."""
    if study.least is None or study.stop is None:
        return "fits on no number of GPUs that was tried"
    at = study.stop.layout.gpus
    first = study.least.layout.gpus
    begins = f"fits from {first} GPUs on"
    if study.beyond is None:
        return f"{begins}; doubling still pays at {at}"
    gain = study.stop.hours / study.beyond.hours
    why = "; ".join(reasons(study.beyond)[:2])
    more = study.beyond.layout.gpus
    return f"{begins}; stops paying at {at}: {more} are {gain:.2f} times as fast ({why})"
