"""What a rank sends and receives in one step, by group and kind of collective.

Payloads are counted as the tensor that every rank ends with in full (all-reduce, all-gather), begins with in full
(reduce-scatter), or hands on (send). What then crosses a link of a ring is less than twice that (``Traffic.wire``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import Parameter, buffer_numel, chunk_layers, stage_parameters
from ctpd_nemo.planner.shapes import Shape

# Between two stages the shape of a tensor of three dimensions goes first, int64 (``variable_seq_lengths``).
_SHAPE_BYTES = 3 * 8


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind that a rank takes part in.

    Attributes:
        group: "tensor", "pipeline", "context", "data" or "embedding".
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "send".
        payload: Bytes, as the module's text counts them.
        calls: Collectives.
    """

    group: str
    kind: str
    payload: float
    calls: float

    def wire(self, size: int) -> float:
        """Bytes that each rank of a ring of so many sends."""
        if self.kind == "send":
            return self.payload
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (size - 1) / size


def group_sizes(parallel: ParallelConfig, replicas: int) -> dict[str, int]:
    """Ranks of each kind of group; ``replicas`` counts data- and context-parallel ones."""
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": replicas,
        "embedding": 2,
    }


def step_traffic(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    shapes: Sequence[Shape],
    replicas: int,
    stage: int,
    backward: bool = True,
    attention: str = "fused",
    log_probs: bool = True,
    more: Sequence[Parameter] = (),
) -> list[Traffic]:
    """Everything of one step, microbatches and the update.

    Args:
        architecture: Of the model.
        parallel: The layout.
        numerics: Number formats.
        shapes: The microbatches of this rank.
        replicas: Ranks that hold the same parameters.
        stage: The pipeline stage of the rank.
        backward: Whether the model is trained; else the pass is forward only.
        attention: "fused" or "local".
        log_probs: Whether the loss is one of log-probs; the sums of another are not counted here.
        more: Parameters that the last stage has beside the model's.
    """
    found: list[Traffic] = []
    for shape in shapes:
        found += tensor_traffic(architecture, parallel, numerics, shape, stage, backward, log_probs)
        found += pipeline_traffic(architecture, parallel, numerics, shape, stage, backward)
        found += context_traffic(architecture, parallel, numerics, shape, stage, backward, attention, log_probs)
    if backward:
        found += update_traffic(architecture, parallel, numerics, replicas, stage, more)
    return merged(found)


def merged(traffic: Sequence[Traffic]) -> list[Traffic]:
    """Added up by group and kind."""
    keys = dict.fromkeys((one.group, one.kind) for one in traffic)
    return [
        Traffic(
            *key,
            payload=sum(one.payload for one in traffic if (one.group, one.kind) == key),
            calls=sum(one.calls for one in traffic if (one.group, one.kind) == key),
        )
        for key in keys
    ]


def tensor_traffic(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    shape: Shape,
    stage: int,
    backward: bool,
    log_probs: bool = True,
) -> list[Traffic]:
    """Of one microbatch within the tensor-parallel group.

    A layer sums its output over the group twice, and backward the gradient of its input twice. Sequence parallelism
    makes a reduce-scatter and an all-gather of each sum, and gathers the inputs again for the gradients of the weights.
    """
    if parallel.tensor == 1:
        return []
    layers = chunk_layers(architecture, parallel) * (parallel.virtual_pipeline or 1)
    first, last = stage == 0, stage == parallel.pipeline - 1
    hidden = shape.tokens / parallel.context * architecture.hidden_size * numerics.element_bytes
    again = layers if backward and parallel.recompute == "full" else 0
    # The maximum of every response token, and then its sum and its label's logit, fp32.
    numbers = Traffic("tensor", "all-reduce", 3 * 4 * shape.targets / parallel.context, 2)
    found = [numbers] if last and log_probs else []
    if not parallel.sequence:
        sums = 2 * (layers + again) + first + (2 * layers + last if backward else 0)
        return [Traffic("tensor", "all-reduce", sums * hidden, sums), *found]
    scatters = 2 * (layers + again) + first + (2 * layers + last if backward else 0)
    gathers = 2 * (layers + again) + last + (4 * layers + first if backward else 0)
    return [
        Traffic("tensor", "reduce-scatter", scatters * hidden, scatters),
        Traffic("tensor", "all-gather", gathers * hidden, gathers),
        *found,
    ]


def pipeline_traffic(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, shape: Shape, stage: int, backward: bool
) -> list[Traffic]:
    """Of one microbatch, to the next stage and back to the one before."""
    if parallel.pipeline == 1:
        return []
    share = parallel.context * (parallel.tensor if parallel.sequence else 1)
    hidden = shape.tokens / share * architecture.hidden_size * numerics.element_bytes
    chunks = parallel.virtual_pipeline or 1
    forward = chunks - (stage == parallel.pipeline - 1)
    back = chunks - (stage == 0) if backward else 0
    # The shape of the gradient is that of the activation, but goes with it all the same.
    return [Traffic("pipeline", "send", (forward + back) * (hidden + _SHAPE_BYTES), 2 * (forward + back))]


def context_traffic(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    shape: Shape,
    stage: int,
    backward: bool,
    attention: str,
    log_probs: bool = True,
) -> list[Traffic]:
    """Of one microbatch within the context-parallel group.

    Fused attention sends keys and values round a ring, and backward them and their gradients; or it changes heads for
    tokens before attention and back behind it ("a2a"). The local attention gathers whole sequences.
    """
    if parallel.context == 1:
        return []
    layers = chunk_layers(architecture, parallel) * (parallel.virtual_pipeline or 1)
    again = layers if backward and parallel.recompute != "none" else 0
    queries = architecture.num_attention_heads * architecture.head_dim // parallel.tensor
    keys = 2 * architecture.num_query_groups * architecture.head_dim // parallel.tensor
    token = shape.tokens * numerics.element_bytes
    # Spans lie over all ranks: their sums do not, of at most as many spans as targets, fp32.
    last = stage == parallel.pipeline - 1
    sums = [Traffic("context", "all-reduce", 4 * shape.targets, 1)] if last and log_probs else []
    if attention == "local":
        gathers, scatters = 3 * (layers + again), 3 * layers if backward else 0
        gathered = Traffic("context", "all-gather", gathers / 3 * token * (queries + keys), gathers)
        scattered = Traffic("context", "reduce-scatter", scatters / 3 * token * (queries + keys), scatters)
        return [gathered, *([scattered] if backward else []), *sums]
    passes = layers + again + (layers if backward else 0)
    if parallel.context_communication == "a2a":
        share = token / parallel.context
        return [Traffic("context", "all-to-all", passes * share * (2 * queries + keys), 4 * passes), *sums]
    rounds = (parallel.context - 1) * (layers + again + (2 * layers if backward else 0))
    return [Traffic("context", "send", rounds * token / parallel.context * keys, rounds), *sums]


def update_traffic(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    replicas: int,
    stage: int,
    more: Sequence[Parameter] = (),
) -> list[Traffic]:
    """Of one step: gradients are summed, and updated weights handed round."""
    chunks = stage_parameters(architecture, parallel, stage, more)
    found = []
    if replicas > 1:
        numel = sum(buffer_numel(chunk, replicas, parallel.distributed_optimizer) for chunk in chunks)
        if parallel.distributed_optimizer:
            found.append(Traffic("data", "reduce-scatter", numel * 4, len(chunks)))
            found.append(Traffic("data", "all-gather", numel * numerics.element_bytes, len(chunks)))
        else:
            found.append(Traffic("data", "all-reduce", numel * 4, len(chunks)))
        # How many losses there were, int32, by which all gradients are divided.
        found.append(Traffic("data", "all-reduce", 4, 1))
    replicated = sum(_partial_gradients(chunk, parallel) for chunk in chunks)
    if parallel.tensor > 1 and replicated:
        found.append(Traffic("tensor", "all-reduce", replicated * 4, 1))
    if architecture.tied_embeddings and parallel.pipeline > 1 and stage in (0, parallel.pipeline - 1):
        rows = padded_vocab_size(architecture.vocab_size, parallel.tensor) // parallel.tensor
        found.append(Traffic("embedding", "all-reduce", rows * architecture.hidden_size * 4, 1))
    return found


def _partial_gradients(chunk: Sequence[Parameter], parallel: ParallelConfig) -> int:
    """Elements of replicated weights whose gradient is a partial sum on each rank of the tensor-parallel group.

    All norms under sequence parallelism; without it those of queries and keys, each head of which is on one rank.
    """
    by_head = (".q_layernorm", ".k_layernorm")
    return sum(
        parameter.numel
        for parameter in chunk
        if parameter.replicated and (parallel.sequence or any(name in parameter.name for name in by_head))
    )
