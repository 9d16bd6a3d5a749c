"""The best layout for a number of GPUs: the one that is done first, of those that divide and fit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ctpd_nemo.data.packing import round_up, whole_multiple
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.memory import model_passes
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.estimate import Estimate, check_layout, checked, estimate, fits, memory
from ctpd_nemo.planner.hardware import GIB, Hardware
from ctpd_nemo.planner.jobs import Job, Layout
from ctpd_nemo.planner.workload import Lengths

_RECOMPUTE = ("none", "selective", "full")
_TENSOR = (1, 2, 4, 8, 16)
_CONTEXT = (1, 2, 4, 8)
# Chunks of a pipeline stage beyond these only add messages.
_MOST_CHUNKS = 8
# Budgets of a microbatch, in pairs of longest sequences.
_BUDGETS = (1, 2, 4, 8)


def best_layout(job: Job, gpus: int, hardware: Hardware, lengths: Lengths) -> Estimate | None:
    """The fastest layout on exactly so many GPUs; ``None`` where none fits."""
    found = (estimate(job, layout, hardware, lengths) for layout in fitting_layouts(job, gpus, hardware))
    return min(found, key=_preference, default=None)


def _preference(found: Estimate) -> tuple[float, float, int]:
    """Shortest job; among equals, to a thousandth, the one with the fewest stages and the least memory."""
    return (float(f"{found.hours:.3g}"), found.layout.parallel.pipeline, round(found.peak_bytes / GIB))


def fitting_layouts(job: Job, gpus: int, hardware: Hardware) -> Iterator[Layout]:
    """Every layout that divides and fits, each with the least recomputation that makes it fit."""
    for shape in _shapes(job, gpus, hardware):
        for budget in _budgets(job, shape, gpus):
            layout = Layout(gpus, shape, budget)
            if checked(job, layout):
                fitting = (one for one in _ways(job, layout, hardware) if fits(memory(job, one), hardware))
                yield from itertools.islice(fitting, 1)


def _ways(job: Job, layout: Layout, hardware: Hardware) -> list[Layout]:
    """The same layout with more and more recomputation; for scoring, with as many models at once as the job holds."""
    if job.model is None:
        return [replace(layout, held=_held(job, layout, hardware))]
    return [replace(layout, parallel=replace(layout.parallel, recompute=recompute)) for recompute in _RECOMPUTE]


def _held(job: Job, layout: Layout, hardware: Hardware) -> int | None:
    """How many models a scoring job holds at once, by the rule of the job itself; ``None`` for all."""
    one = max(stage.frozen for stage in memory(job, replace(layout, held=1)))
    count = sum(frozen.count for frozen in job.frozen)
    free = int((hardware.memory_gib - hardware.reserved_gib) * GIB)
    most = max(len(models) for models in model_passes([int(one)] * count, free, job.together))
    return None if most == count else most


def _shapes(job: Job, gpus: int, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Sizes of groups: tensor parallelism within a node, sequence parallelism wherever there is some."""
    layers = math.gcd(*(model.architecture.num_layers for model in job.models))
    for tensor in (size for size in _TENSOR if size <= hardware.gpus_per_node and gpus % size == 0):
        for context in (size for size in _CONTEXT if gpus % (tensor * size) == 0):
            for pipeline in _divisors(layers):
                if gpus % (tensor * context * pipeline):
                    continue
                per_stage = layers // pipeline
                chunks = [n for n in _divisors(per_stage) if 1 < n <= _MOST_CHUNKS] if pipeline > 1 else []
                for virtual in [None, *chunks]:
                    yield _with_overlap(
                        replace(
                            job.parallel,
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=virtual,
                            context=context,
                            sequence=tensor > 1,
                            overlap_tensor=job.parallel.overlap_tensor and tensor > 1,
                        ),
                        gpus,
                    )


def _with_overlap(parallel: ParallelConfig, gpus: int) -> ParallelConfig:
    """Sharded optimizer state, and reductions behind computation, wherever there is somebody to share with."""
    shared = gpus > parallel.tensor * parallel.pipeline
    return replace(parallel, distributed_optimizer=True, overlap_grad_reduce=shared, overlap_param_gather=shared)


def _budgets(job: Job, parallel: ParallelConfig, gpus: int) -> list[int]:
    """Budgets worth a look: none beyond what a rank can have in a step."""
    layout = Layout(gpus, replace(parallel, overlap_tensor=False), 1)
    multiple = whole_multiple(layout.multiple(job.precision), layout.sequence_multiple)
    pair = 2 * round_up(job.max_length, multiple)
    ranks = 1 if job.method == "score" else layout.data_ranks
    most = -(-job.pairs // ranks) * len(job.responses) * job.max_length
    return [factor * pair for factor in _BUDGETS if factor == 1 or (factor // 2) * pair < most]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def given_layout(job: Job, gpus: int, hardware: Hardware, lengths: Lengths) -> Estimate:
    """The layout that the experiment names.

    Raises:
        InputError: It does not divide, or does not fit; the line says what would.
    """
    layout = job.given_layout(gpus)
    try:
        check_layout(job, layout)
        if job.model is None:
            layout = _as_scored(job, layout, hardware)
    except InputError as error:
        expected = f"{error.expected}; {what_fits(job, gpus, hardware, lengths)}"
        raise InputError(f"stage {job.name}, {error.place}", error.found, expected) from error
    found = estimate(job, layout, hardware, lengths)
    if not fits(found.stages, hardware):
        place = f"stage {job.name}, parallel"
        need = f"{layout} on {gpus} GPUs: {found.peak_bytes / GIB:.1f} GiB on pipeline stage {found.fullest_stage}"
        room = f"at most the {hardware.usable_bytes / GIB:.1f} GiB that {hardware.name} leaves"
        raise InputError(place, need, f"{room}; {what_fits(job, gpus, hardware, lengths)}")
    return found


def _as_scored(job: Job, layout: Layout, hardware: Hardware) -> Layout:
    """What a scoring job makes of its layout: as many models at once as it takes, and the largest budget that fits."""
    (layout,) = _ways(job, layout, hardware)
    most = job.pairs * len(job.responses) * job.max_length
    while job.largest_budget and 2 * layout.microbatch_tokens <= most:
        doubled = replace(layout, microbatch_tokens=2 * layout.microbatch_tokens)
        if not fits(memory(job, doubled), hardware):
            break
        layout = doubled
    return layout


def what_fits(job: Job, gpus: int, hardware: Hardware, lengths: Lengths) -> str:
    """What to do instead: the best layout on these GPUs, or the fewest GPUs that there is one for."""
    best = best_layout(job, gpus, hardware, lengths) or fewest_gpus(job, gpus, hardware, lengths)
    if best is None:
        return "nothing that was tried fits, up to 64 times as many GPUs"
    return f"what fits: {best.layout.gpus} GPUs, {best.layout}, in {best.peak_bytes / GIB:.1f} GiB"


def fewest_gpus(job: Job, more_than: int, hardware: Hardware, lengths: Lengths) -> Estimate | None:
    """The best layout on the fewest GPUs beyond ``more_than`` that there is one for: whole nodes where over one."""
    node = hardware.gpus_per_node
    sizes = [*range(more_than + 1, node + 1), *range((more_than // node + 1) * node, 64 * max(more_than, node), node)]
    for gpus in (size for size in sizes if size > more_than):
        best = best_layout(job, gpus, hardware, lengths)
        if best is not None:
            return best
    return None
