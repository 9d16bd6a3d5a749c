"""One job in one layout: does it fit, and what does it cost?"""

import functools
from dataclasses import dataclass, replace

from ctpd_nemo.data.packing import check_budget
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.cost import sequence_cost
from ctpd_nemo.models.gpt import transformer_config
from ctpd_nemo.planner.architecture import NamedArchitecture
from ctpd_nemo.planner.batches import STEPS, Cut, Load, cut_batches
from ctpd_nemo.planner.communication import Traffic, merged, step_traffic
from ctpd_nemo.planner.distillation import loss_flops, loss_seconds, loss_traffic
from ctpd_nemo.planner.flops import hardware_flops, model_flops
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.head import HeadSeconds
from ctpd_nemo.planner.jobs import FrozenModels, Job, Layout
from ctpd_nemo.planner.memory import Frozen, Request, StageMemory, job_memory
from ctpd_nemo.planner.numerics import Numerics, numerics_of
from ctpd_nemo.planner.shapes import Shape, fullest_shape
from ctpd_nemo.planner.timing import Parts, pass_parts, update_parts
from ctpd_nemo.planner.workload import Lengths

# Shards of a scoring job that stand for all of them: each has hundreds of pairs.
_SHARDS = 2


@dataclass(frozen=True)
class Estimate:
    """What a job costs in a layout.

    Attributes:
        job: The job.
        layout: The layout.
        stages: Memory of one GPU of every pipeline stage.
        parts: Where the time of a step goes; a step of a scoring job is one shard on every replica.
        steps: Steps of the job.
        step_tokens: Tokens of the trained (or scored) model's sequences in a step, padding excluded, over all ranks.
        microbatches: Of the fullest rank in a step, mean over steps.
        busy_ranks: Data-parallel ranks that have pairs.
        model_flops: Operations of a step that the mathematics needs, all models, all ranks.
        hardware_flops: Operations of a step that run.
        traffic: What one rank of the last pipeline stage sends in a mean step.
        start_seconds: Before the first step: the job starts, and every replica reads its weights.
    """

    job: Job
    layout: Layout
    stages: list[StageMemory]
    parts: Parts
    steps: int
    step_tokens: float
    microbatches: float
    busy_ranks: float
    model_flops: float
    hardware_flops: float
    traffic: list[Traffic]
    start_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return self.parts.total

    @property
    def hours(self) -> float:
        """Of the whole job; what it writes is left out."""
        return (self.start_seconds + self.steps * self.step_seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs, idle ones too."""
        return self.hours * self.layout.gpus

    @property
    def tokens_per_second(self) -> float:
        """Tokens of sequences, over all GPUs."""
        return self.step_tokens / self.step_seconds

    def utilisation(self, hardware: Hardware) -> float:
        """Model operations as a share of what the data sheet promises (MFU)."""
        peak = hardware.peak_rate("fp8" if self.job.precision.fp8 else self.job.precision.dtype) * self.layout.gpus
        return self.model_flops / (self.step_seconds * peak)

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest GPU."""
        return max(stage.peak for stage in self.stages)

    @property
    def fullest_stage(self) -> int:
        """The pipeline stage of that GPU."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].peak)


def check_layout(job: Job, layout: Layout) -> None:
    """Stop where sizes do not divide, or a pair does not fit a microbatch.

    Raises:
        InputError: Names what does not go together.
    """
    layout.parallel.check(layout.gpus)
    for model in job.models:
        # Only sizes are looked at: what Transformer Engine would fuse does not matter here.
        transformer_config(model.architecture, layout.parallel, job.precision, use_transformer_engine=False)
    multiples = layout.multiple(job.precision), layout.sequence_multiple
    check_budget(layout.microbatch_tokens, job.max_length, *multiples, job.padding)


def memory(job: Job, layout: Layout) -> list[StageMemory]:
    """What every pipeline stage holds at the worst moment: full microbatches, as many as a rank can have."""
    ranks = 1 if job.method == "score" else layout.data_ranks
    pairs = -(-job.pairs // ranks)
    step_tokens = pairs * len(job.responses) * job.max_length
    tokens = layout.microbatch_tokens
    if not layout.parallel.overlap_tensor:
        tokens = min(tokens, step_tokens)
    shape = fullest_shape(tokens, job.max_length)
    request = Request(
        architecture=job.model.architecture if job.model else None,
        shape=shape,
        microbatches=max(1, -(-step_tokens // tokens)),
        step_tokens=step_tokens,
        frozen=tuple(_frozen(frozen, job, layout, shape) for frozen in job.frozen),
        attention=job.attention,
        loss=job.loss,
    )
    return job_memory(request, layout.parallel, _numerics(job, job.models[0]), layout.replicas)


def _numerics(job: Job, model: NamedArchitecture, frozen: bool = False) -> Numerics:
    return numerics_of(job.precision, model.architecture, frozen)


def _frozen(frozen: FrozenModels, job: Job, layout: Layout, shape: Shape) -> Frozen:
    held = frozen.count if layout.held is None else layout.held
    return Frozen(frozen.model.architecture, held, shape, _numerics(job, frozen.model, frozen=True))


def estimate(job: Job, layout: Layout, hardware: Hardware, lengths: Lengths) -> Estimate:
    """Memory, operations, communication and time of a job in a layout that ``check_layout`` has passed."""
    loads = _loads(job, layout, lengths)
    stages = memory(job, layout)
    if job.model is None:
        return _estimate_scoring(job, layout, hardware, lengths, loads, stages)
    load, steps = loads[0], StepPlan(lengths.pairs, job.pairs, job.epochs, job.max_steps).total_steps
    a, parallel, ranks = job.model.architecture, layout.parallel, layout.data_ranks
    numerics = _numerics(job, job.model)
    head = None
    if job.loss:
        head = loss_seconds(job.loss, parallel, numerics, hardware, load, loads[1] if len(loads) > 1 else None)
    passes = pass_parts(a, parallel, numerics, hardware, load, ranks, backward=True, head=head)
    microbatches = float(load.counts.max(axis=1).mean())
    more = job.loss.projectors() if job.loss else ()
    parts = passes + update_parts(a, parallel, numerics, hardware, ranks, passes, microbatches, more)
    for frozen in job.frozen:
        parts = parts + _scoring_parts(frozen, job, layout, hardware, _load_of(frozen, job, loads), ranks)
    return Estimate(
        job=job,
        layout=layout,
        stages=stages,
        parts=parts,
        steps=steps,
        step_tokens=load.per_step(load.real_tokens),
        microbatches=microbatches,
        busy_ranks=float((load.counts > 0).sum(axis=1).mean()),
        traffic=_traffic(job, layout, loads),
        start_seconds=_start_seconds(job, layout, hardware),
        **_flops(job, layout, loads),
    )


def _estimate_scoring(
    job: Job, layout: Layout, hardware: Hardware, lengths: Lengths, loads: list[Load], stages: list[StageMemory]
) -> Estimate:
    """Replicas take shards in turn and never wait for each other but at the end."""
    shards = -(-lengths.pairs // job.pairs)
    rounds = -(-shards // layout.data_ranks)
    busy = shards / (rounds * layout.data_ranks)
    one = Parts(fixed=hardware.step_ms * 1e-3)
    for frozen in job.frozen:
        one = one + _scoring_parts(frozen, job, layout, hardware, _load_of(frozen, job, loads), 1)
    values = {name: share * one.total * busy for name, share in one.shares().items()}
    values["waiting"] += one.total * (1 - busy)
    flops = _flops(job, layout, loads)
    replicas = busy * layout.data_ranks
    return Estimate(
        job=job,
        layout=layout,
        stages=stages,
        parts=Parts(**values),
        steps=rounds,
        step_tokens=loads[0].per_step(loads[0].real_tokens) * replicas,
        microbatches=float(loads[0].counts.mean()),
        busy_ranks=replicas,
        traffic=_traffic(job, layout, loads),
        start_seconds=_start_seconds(job, layout, hardware),
        **{name: value * replicas for name, value in flops.items()},
    )


def _start_seconds(job: Job, layout: Layout, hardware: Hardware) -> float:
    """Every GPU reads its share of every model once, together with the others of its node."""
    models = ([job.model] if job.model else []) + [one.model for one in job.frozen for _ in range(one.count)]
    shares = layout.parallel.tensor * layout.parallel.pipeline
    weights = sum(model.parameters * _numerics(job, model).element_bytes / shares for model in models)
    gpus = min(layout.gpus, hardware.gpus_per_node)
    return hardware.start_s + weights * gpus / (hardware.read_gb_per_s * 1e9)


def _scoring_parts(frozen: FrozenModels, job: Job, layout: Layout, hardware: Hardware, load: Load, ranks: int) -> Parts:
    one = pass_parts(
        frozen.model.architecture,
        layout.parallel,
        _numerics(job, frozen.model, frozen=True),
        hardware,
        load,
        ranks,
        backward=False,
        head=HeadSeconds.none(load) if job.loss else None,
    )
    return functools.reduce(Parts.__add__, [one] * frozen.count)


def _loads(job: Job, layout: Layout, lengths: Lengths) -> list[Load]:
    """The load of the job's own side, and behind it that of the other where a frozen model reads that."""
    other = next((frozen.side for frozen in job.frozen if frozen.side != job.side), None)
    scoring = job.method == "score"
    cut = Cut(
        side=job.side,
        responses=job.responses,
        pairs=job.pairs,
        ranks=1 if scoring else layout.data_ranks,
        budget=layout.microbatch_tokens,
        multiple=layout.multiple(job.precision),
        sequence_multiple=layout.sequence_multiple,
        padding=job.padding,
        other=other,
        attention=job.attention,
        cost=sequence_cost(job.models[0].architecture),
        context=layout.parallel.context,
    )
    return cut_batches(lengths, cut, _SHARDS if scoring else STEPS)


def _load_of(frozen: FrozenModels, job: Job, loads: list[Load]) -> Load:
    """The load of frozen models: that of their side."""
    return loads[0] if frozen.side == job.side else loads[1]


def _mean_shape(load: Load) -> Shape:
    """All microbatches of a mean step as one, over all ranks: operations add up over them."""
    names = ("tokens", "targets", "attended", "scored")
    tokens, targets, attended, scored = (round(load.per_step(getattr(load, name))) for name in names)
    return Shape(tokens, targets, sequences=0, longest=0, attended=attended, scored=scored)


def _flops(job: Job, layout: Layout, loads: list[Load]) -> dict[str, float]:
    model = hardware = 0.0
    shapes = [_mean_shape(load) for load in loads]
    if job.loss:
        own, other = shapes[0].targets, shapes[1].targets if len(shapes) > 1 else 0
        model += loss_flops(job.loss, layout.parallel, own, other)
        hardware += loss_flops(job.loss, layout.parallel, own, other, hardware=True)
        shapes = [replace(shape, targets=0) for shape in shapes]
    if job.model is not None:
        shape = shapes[0]
        model += model_flops(job.model.architecture, shape).total
        count = float(loads[0].counts.sum(axis=1).mean())
        hardware += hardware_flops(job.model.architecture, layout.parallel, shape, microbatches=count).total
    for frozen in job.frozen:
        a, shape = frozen.model.architecture, shapes[0 if frozen.side == job.side else 1]
        model += frozen.count * model_flops(a, shape, backward=False).total
        hardware += frozen.count * hardware_flops(a, layout.parallel, shape, backward=False).total
    return {"model_flops": model, "hardware_flops": hardware}


def _traffic(job: Job, layout: Layout, loads: list[Load]) -> list[Traffic]:
    """Of a rank of the last pipeline stage whose data-parallel rank has the mean load of those that have any."""
    last, found = layout.parallel.pipeline - 1, []

    def shapes(load: Load) -> list[Shape]:
        ranks, count = load.tokens.shape[1], max(1, round(float(load.counts.mean())))
        tokens, targets = (load.per_step(values) / ranks / count for values in (load.tokens, load.targets))
        return [Shape(round(tokens), round(targets), 0, 0, 0, 0)] * count

    if job.model is not None:
        found += step_traffic(
            job.model.architecture,
            layout.parallel,
            _numerics(job, job.model),
            shapes(loads[0]),
            layout.replicas,
            last,
            attention=job.attention,
            log_probs=job.loss is None,
            more=job.loss.projectors() if job.loss else (),
        )
    if job.loss:
        sides = [shapes(load) for load in loads]
        numerics = _numerics(job, job.models[0])
        found += loss_traffic(job.loss, layout.parallel, numerics, sides[0], sides[1] if len(sides) > 1 else [])
    for frozen in job.frozen:
        one = step_traffic(
            frozen.model.architecture,
            layout.parallel,
            _numerics(job, frozen.model, frozen=True),
            shapes(_load_of(frozen, job, loads)),
            1,
            last,
            backward=False,
            attention=job.attention,
            log_probs=job.loss is None,
        )
        found += one * frozen.count
    return merged(found)


def fits(stages: list[StageMemory], hardware: Hardware) -> bool:
    """Whether every GPU has the memory."""
    return all(stage.peak <= hardware.usable_bytes for stage in stages)


def checked(job: Job, layout: Layout) -> bool:
    """Whether sizes divide."""
    try:
        check_layout(job, layout)
    except InputError:
        return False
    return True
