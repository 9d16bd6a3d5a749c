"""What one GPU holds at the worst moment of a step, by kind and pipeline stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.activations import LayerBytes, final_norm_bytes, layer_bytes, rotary_bytes
from ctpd_nemo.planner.distillation import DistillationLoss, kept_for_step, loss_bytes
from ctpd_nemo.planner.head import HeadBytes, head_bytes
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import VOCABULARY, Parameter, buffer_numel, chunk_layers, stage_parameters
from ctpd_nemo.planner.schedule import in_flight
from ctpd_nemo.planner.shapes import Shape

# tokens, position_ids, labels int64; span_ids int32; and for the spans, of which there are at most as many as tokens,
# span_response int32, span_weights and reference_logprobs f32 (``data.batch.Microbatch``).
BATCH_BYTES_PER_TOKEN = 3 * 8 + 4 + 3 * 4
# Adam's two moments, fp32.
_MOMENT_BYTES = 8


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage.

    Attributes:
        weights: Of the trained model, FP8 copies included.
        gradients: The fp32 buffer.
        optimizer: Main weights where the weights are not fp32, and Adam's moments.
        frozen: Weights of the models beside it: a reference, teachers; in a scoring job, all there is.
        activations: The most that microbatches in the air keep for their backward pass.
        sent: Outputs of a stage that stay until their gradients have come back.
        head: Temporaries of the log-probs, on the last stage.
        work: Temporaries of a layer's backward pass.
        passing: The most that the four above take at one time; not their sum, as the head is done with by the time that
            a layer is made again.
        scoring: Temporaries of the frozen models' forward pass, which comes before.
        data: The step's microbatches, the tables of rotary angles, and what distillation keeps of the teacher's states.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0
    activations: float = 0.0
    sent: float = 0.0
    head: float = 0.0
    work: float = 0.0
    passing: float = 0.0
    scoring: float = 0.0
    data: float = 0.0

    @property
    def resident(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.frozen + self.data

    @property
    def peak(self) -> float:
        """The most at one time: scoring is over before the first forward pass."""
        return self.resident + max(self.passing, self.scoring)


@dataclass(frozen=True)
class Frozen:
    """Models that only look: the reference of DPO, the teachers of online CTPD, what a scoring job scores.

    Attributes:
        architecture: Of each.
        count: How many of them stand side by side.
        shape: Of their own microbatches.
        numerics: Number formats.
    """

    architecture: Architecture
    count: int
    shape: Shape
    numerics: Numerics


@dataclass(frozen=True)
class Request:
    """A job, as far as its memory depends on it.

    Attributes:
        architecture: Of the trained model; ``None`` in a scoring job.
        shape: The largest microbatch.
        microbatches: The most of them that one rank has in a step.
        step_tokens: The most tokens that one rank has in a step.
        frozen: Models beside it.
        attention: "fused" or "local".
        device: "cuda" or "cpu".
        loss: That of distillation; ``None`` for one of log-probs.
    """

    architecture: Architecture | None
    shape: Shape
    microbatches: int
    step_tokens: int
    frozen: Sequence[Frozen] = field(default_factory=tuple)
    attention: str = "fused"
    device: str = "cuda"
    loss: DistillationLoss | None = None


def job_memory(request: Request, parallel: ParallelConfig, numerics: Numerics, replicas: int) -> list[StageMemory]:
    """Memory of every pipeline stage.

    Args:
        request: The job.
        parallel: The layout.
        numerics: Number formats of the trained model.
        replicas: Data-parallel size times context-parallel size: ranks that hold the same parameters.
    """
    return [_stage_memory(request, parallel, numerics, replicas, stage) for stage in range(parallel.pipeline)]


def _stage_memory(
    request: Request, parallel: ParallelConfig, numerics: Numerics, replicas: int, stage: int
) -> StageMemory:
    memory, kept, last = StageMemory(), 0.0, stage == parallel.pipeline - 1
    if request.architecture is not None:
        projectors = request.loss.projectors() if request.loss else ()
        chunks = stage_parameters(request.architecture, parallel, stage, projectors)
        memory = trained_memory(chunks, parallel, numerics, replicas)
        memory = replace(memory, **_passing(request, request.architecture, parallel, numerics, stage))
    if request.loss:
        kept = kept_for_step(request.loss, numerics, request.step_tokens, last)
    return replace(
        memory,
        frozen=sum(frozen_memory(model, parallel, stage) for model in request.frozen),
        scoring=max((_scoring(model, parallel, stage, request) for model in request.frozen), default=0.0),
        data=_data(request) + kept,
    )


def trained_memory(
    chunks: Sequence[Sequence[Parameter]], parallel: ParallelConfig, numerics: Numerics, replicas: int
) -> StageMemory:
    """Weights, gradients and optimizer state of a rank, from the parameters of its chunks."""
    sharded = parallel.distributed_optimizer
    numel = sum(buffer_numel(chunk, replicas, sharded) for chunk in chunks)
    owned = sum(parameter.numel for chunk in chunks for parameter in chunk) / (replicas if sharded else 1)
    return StageMemory(
        weights=numel * numerics.element_bytes + _copies(chunks, numerics),
        gradients=numel * 4,
        optimizer=owned * (numerics.main_bytes + _MOMENT_BYTES),
    )


def frozen_memory(frozen: Frozen, parallel: ParallelConfig, stage: int) -> float:
    """Weights of frozen models on one rank."""
    numerics = frozen.numerics
    chunks = stage_parameters(frozen.architecture, parallel, stage)
    numel = sum(parameter.numel for chunk in chunks for parameter in chunk)
    return frozen.count * (numel * numerics.element_bytes + _copies(chunks, numerics))


def _copies(chunks: Sequence[Sequence[Parameter]], numerics: Numerics) -> float:
    """What weights of linear layers take beyond others, which FP8 leaves alone: embedding, output layer and norms."""
    linear = sum(p.numel for chunk in chunks for p in chunk if not p.replicated and p.name != VOCABULARY)
    return (numerics.linear_bytes - numerics.element_bytes) * linear


def _passing(
    request: Request, architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, stage: int
) -> dict[str, float]:
    """Activations and temporaries of a step's forward and backward passes."""
    last = stage == parallel.pipeline - 1
    layer = layer_bytes(architecture, parallel, numerics, request.shape, request.attention)
    head = HeadBytes(0.0, 0.0, 0.0)
    if last and request.loss:
        head = loss_bytes(request.loss, parallel, numerics, request.shape, request.device)
    elif last:
        head = head_bytes(architecture, parallel, numerics, request.shape, request.device)
    ending = head.saved
    if last:
        ending += final_norm_bytes(architecture, parallel, numerics, request.shape, request.attention)
    in_air = _in_air(request, parallel, stage)
    kept = in_air * chunk_layers(architecture, parallel) * _kept_of_layer(layer, parallel.recompute)
    again = kept + _recomputed(layer, parallel.recompute, numerics)
    sent = 0.0 if parallel.pipeline == 1 or (last and not parallel.virtual_pipeline) else in_air * layer.output
    return {
        "activations": max(kept + ending, again),
        "sent": sent,
        "head": head.work,
        "work": layer.work,
        # A layer that is made again stands beside what comes out of it.
        "passing": sent + max(kept + ending + layer.gathered + head.work, again + layer.output + layer.work),
    }


def _in_air(request: Request, parallel: ParallelConfig, stage: int) -> float:
    """Full microbatches that chunks of a stage hold at the worst moment, as much as several that are not full.

    All of a step have no more tokens than the step. Those that only fill up a group of an interleaved schedule are as
    large as the smallest (``models.forward``), which is at most the mean.
    """
    step = request.step_tokens / request.shape.tokens
    total = 0.0
    for held in in_flight(parallel, stage, request.microbatches):
        real = min(held, request.microbatches)
        total += min(real, max(1.0, step)) + (held - real) * min(1.0, step / request.microbatches)
    return total


def _kept_of_layer(layer: LayerBytes, recompute: str) -> float:
    return {"none": layer.whole, "selective": layer.without_attention, "full": layer.input}[recompute]


def _recomputed(layer: LayerBytes, recompute: str, numerics: Numerics) -> float:
    """What making a layer's activations again adds, at its end; the part that is done with is gone by then."""
    if recompute == "full":
        # In fp32 the first norm keeps the layer's input itself and no copy.
        return layer.whole - (layer.input if numerics.element_bytes == 4 else 0.0)
    if recompute == "selective":
        return max(0.0, layer.attention - layer.mlp)
    return 0.0


def _scoring(frozen: Frozen, parallel: ParallelConfig, stage: int, request: Request) -> float:
    """Temporaries of a forward pass without a backward pass."""
    numerics = frozen.numerics
    layer = layer_bytes(frozen.architecture, parallel, numerics, frozen.shape, request.attention)
    if stage < parallel.pipeline - 1:
        return layer.forward_work
    if request.loss:
        return max(layer.forward_work, 2 * layer.output)
    head = head_bytes(frozen.architecture, parallel, numerics, frozen.shape, request.device)
    return max(layer.forward_work, 2 * layer.output + head.saved + head.forward_work)


def _data(request: Request) -> float:
    """The batch of a step, which is moved to the GPU at once, and rotary tables of every model's head width."""
    tokens = request.step_tokens * (1 + sum(1 for model in request.frozen if model.shape is not request.shape))
    models = [request.architecture, *(model.architecture for model in request.frozen)]
    tables = max(rotary_bytes(model, request.shape) for model in models if model is not None)
    return tokens * BATCH_BYTES_PER_TOKEN + tables
