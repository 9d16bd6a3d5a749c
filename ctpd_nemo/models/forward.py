"""One pass over the microbatches of a step, through Megatron-Core's forward/backward schedules."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encoded_pair import DIFFERENCES, SKIP_REASONS
from ctpd_nemo.data.loader import StepStats
from ctpd_nemo.losses.logprobs import token_logprobs
from ctpd_nemo.losses.margins import label_and_best_other
from ctpd_nemo.losses.spans import sum_by
from ctpd_nemo.parallel.context import held_tokens


@dataclass
class StepLoss:
    """What a method makes of one microbatch.

    Attributes:
        total: Sum of the losses, a differentiable scalar.
        count: How many losses were summed: pairs, or tokens; gradients are divided by the count of the whole batch.
        sums: Detached scalars to report, each a sum whose mean is over ``counts``.
        counts: For each of ``sums``, what its mean is over.
    """

    total: Tensor
    count: int | Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int | Tensor] = field(default_factory=dict)


# (what is read of the model's output: log-prob of each span fp32 [S] unless a method reads more, microbatch) -> loss
LossFunction = Callable[[Any, Microbatch], StepLoss]
# (chunk with the output layer, hidden states [1, T, H], microbatch, rows that are vocabulary) -> what a loss is made of
OutputReader = Callable[[GPTModel, Tensor, Microbatch, int], Any]


def packed_seq_params(microbatch: Microbatch) -> PackedSeqParams:
    """Where the sequences of a microbatch begin and end, for attention and rotary embedding."""
    # Padding belongs to its sequence. Transformer Engine's context-parallel attention asks for both all the same.
    padded = microbatch.cu_seqlens if parallel_state.get_context_parallel_world_size() > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
    )


def output_weight(model: GPTModel) -> Tensor:
    """This rank's rows of the output layer ``[V, H]``; the embedding where the two are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def span_margins(model: GPTModel, hidden_1TH: Tensor, microbatch: Microbatch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The log-prob of each span, and its margin: the sum over its tokens of their log-prob less the best other token's.

    Arguments and results, twice fp32 ``[num_spans]``, as of ``span_logprobs``; without gradient.
    """
    labels_T, span_T = (_held(microbatch, field) for field in (microbatch.labels, microbatch.span_ids))
    position_N = (labels_T >= 0).nonzero().squeeze(1)
    label_N, other_N = label_and_best_other(
        hidden_1TH[0].index_select(0, position_N),
        output_weight(model),
        labels_T[position_N],
        vocab_size,
        parallel_state.get_tensor_model_parallel_group(),
    )
    span_N, group = span_T[position_N].long(), parallel_state.get_context_parallel_group()
    logprob_S, margin_S = (
        sum_by(values_N, span_N, microbatch.num_spans, group) for values_N in (label_N, label_N - other_N)
    )
    return logprob_S, margin_S


def span_logprobs(model: GPTModel, hidden_1TH: Tensor, microbatch: Microbatch, vocab_size: int) -> Tensor:
    """The log-prob of each span of a microbatch: the sum over its tokens, wherever the context-parallel group has them.

    Args:
        model: The chunk with the output layer.
        hidden_1TH: What the chunk returned: hidden states of the tokens that this rank holds.
        microbatch: All of it.
        vocab_size: Rows of the output layer that are vocabulary.

    Returns:
        fp32 ``[num_spans]``, equal on every rank of the tensor- and context-parallel groups; the gradient reaches the
        tokens that this rank holds.
    """
    labels_T, span_T = (_held(microbatch, field) for field in (microbatch.labels, microbatch.span_ids))
    position_N = (labels_T >= 0).nonzero().squeeze(1)
    logprobs_N = token_logprobs(
        hidden_1TH[0].index_select(0, position_N),
        output_weight(model),
        labels_T[position_N],
        vocab_size,
        parallel_state.get_tensor_model_parallel_group(),
    )
    return sum_by(
        logprobs_N, span_T[position_N].long(), microbatch.num_spans, parallel_state.get_context_parallel_group()
    )


def _held(microbatch: Microbatch, field_T: Tensor) -> Tensor:
    """The part of a field that belongs to the tokens this rank holds."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return field_T
    rank = parallel_state.get_context_parallel_rank()
    return field_T[held_tokens(microbatch.cu_seqlens, microbatch.num_tokens, size, rank)]


def run_microbatches(
    chunks: Sequence[MegatronModule],
    microbatches: Sequence[Microbatch],
    vocab_size: int,
    evaluate: LossFunction,
    forward_only: bool,
    device: torch.device,
    read: OutputReader = span_logprobs,
) -> list[StepLoss]:
    """Forward, and unless ``forward_only`` backward, over all microbatches in pipeline order.

    On the last stage ``read`` makes of a microbatch's hidden states what ``evaluate`` makes its loss of. Gradients end
    in the chunks' buffers, reduced over the data-parallel group and divided by the total count.

    Returns:
        The method's result of each microbatch on the last pipeline stage; an empty list on the others.
    """

    def finish(model: GPTModel, microbatch: Microbatch, hidden_1TH: Tensor) -> tuple[Tensor, Tensor, StepLoss]:
        loss = evaluate(read(model, hidden_1TH, microbatch, vocab_size), microbatch)
        # Context-parallel ranks have the same loss, each with its tokens' share of the gradient: it is counted once.
        counted = parallel_state.get_context_parallel_rank() == 0
        count = torch.as_tensor(loss.count if counted else 0, dtype=torch.int, device=device)
        total, loss.total = loss.total, loss.total.detach()
        return total, count, loss

    def forward_step(batches: Iterator[Microbatch], model: MegatronModule) -> tuple[Tensor, Any]:
        microbatch = next(batches)
        output = model(
            _held(microbatch, microbatch.tokens)[None],
            _held(microbatch, microbatch.position_ids)[None],
            None,
            packed_seq_params=packed_seq_params(microbatch),
        )
        return output, partial(finish, unwrap_model(model), microbatch)

    run = [*microbatches, *_missing_of_group(microbatches, device)]
    batches = [iter(run) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks),
            num_microbatches=len(run),
            # Read by the schedules for buffer shapes; with a pipeline every microbatch announces its own length.
            seq_length=max(microbatch.num_tokens for microbatch in run),
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return results[: len(microbatches)]


def _missing_of_group(microbatches: Sequence[Microbatch], device: torch.device) -> list[Microbatch]:
    """Empty microbatches that complete the last group of an interleaved schedule; none for the other schedules.

    With virtual stages Megatron-Core goes through microbatches in groups of as many as there are pipeline stages.
    """
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return []
    missing = -len(microbatches) % parallel_state.get_pipeline_model_parallel_world_size()
    # As many tokens as one of the others: a number that the layout and the precision can share out.
    num_tokens = min(microbatch.num_tokens for microbatch in microbatches)
    return [Microbatch.filler(num_tokens, pad_token_id=0).to(device) for _ in range(missing)]


def mean_metrics(losses: Sequence[StepLoss], names: Sequence[str], device: torch.device) -> dict[str, float]:
    """Means over the whole batch of all data-parallel ranks, equal on every rank of the job.

    Args:
        losses: What this rank's last stage computed; empty on other stages.
        names: The metrics of the method, in an order that all ranks share.
        device: Where to reduce.
    """
    table = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    for loss in losses:
        for column, name in enumerate(names):
            table[0, column] += loss.sums[name]
            table[1, column] += loss.counts[name]
    # Stages other than the last add zero; tensor- and context-parallel ranks add equal copies, which cancel out.
    dist.all_reduce(table)
    mean = table[0] / table[1].clamp(min=1)
    return dict(zip(names, mean.tolist(), strict=True))


def sum_over_data_parallel(stats: StepStats, device: torch.device) -> StepStats:
    """The counts of all data-parallel ranks together."""
    counts = [stats.pairs, stats.truncated, stats.tokens, stats.response_tokens, stats.padding]
    counts += [stats.skipped[reason] for reason in SKIP_REASONS] + [stats.differing[kind] for kind in DIFFERENCES]
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    pairs, truncated, tokens, response_tokens, padding, *named = total.tolist()
    skipped, differing = (
        Counter({name: count for name, count in zip(names, found, strict=True) if count})
        for names, found in (
            (SKIP_REASONS, named[: len(SKIP_REASONS)]),
            (DIFFERENCES, named[len(SKIP_REASONS) :]),
        )
    )
    return StepStats(pairs, truncated, skipped, tokens, response_tokens, padding, differing)


def equal_microbatches(
    microbatches: list[Microbatch], filler: Callable[[], Microbatch], device: torch.device
) -> list[Microbatch]:
    """Add empty microbatches until every data-parallel rank has equally many.

    Ranks step together: collectives inside the forward pass (FP8 scaling, expert groups) must be met by all.
    """
    most = torch.tensor(len(microbatches), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return microbatches + [filler().to(device) for _ in range(int(most) - len(microbatches))]
