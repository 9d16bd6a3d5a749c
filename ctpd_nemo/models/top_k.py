"""The reference's largest log-probs beside its span scores, in the same forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from numpy.typing import NDArray
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.losses.spans import sum_by
from ctpd_nemo.losses.top_logprobs import TopLogprobs, top_logprobs
from ctpd_nemo.models.response_states import response_positions, response_states
from ctpd_nemo.models.teacher import FrozenModel

Arrays = tuple[NDArray[Any], ...]


class TopKSink(Protocol):
    """Takes the largest log-probs of one shard."""

    def __call__(self, shard: int, rows: Sequence[int], found: Sequence[Arrays]) -> None:
        """Keep them.

        Args:
            shard: Its number.
            rows: Dataset rows of the pairs.
            found: Of each chosen response of n tokens log-probs f32 ``[n, k]`` and words int32 ``[n, k]``, the largest
                first, and what the other probabilities add up to, f32 ``[n]``.
        """


@dataclass(frozen=True)
class TopKScoring:
    """What is kept of the reference beside its span scores.

    Attributes:
        k: Log-probs a token.
        sink: Where they go.
    """

    k: int
    sink: TopKSink

    def score(self, model: FrozenModel, batch: StepBatch, write: bool) -> list[Tensor]:
        """Span log-probs of a shard, as ``FrozenModel.score`` gives them; hands the rest to the sink if ``write``."""
        outputs = model.read(batch.microbatches, self._read)
        if outputs and write:
            pairs = [
                pair
                for microbatch, (_, found) in zip(batch.microbatches, outputs, strict=True)
                for pair in _pairs(microbatch, found)
            ]
            pairs.sort(key=lambda pair: pair[0])
            self.sink(batch.step, [row for row, _ in pairs], [arrays for _, arrays in pairs])
        return [span_S for span_S, _ in outputs]

    def _read(
        self, model: GPTModel, hidden_1TH: Tensor, microbatch: Microbatch, vocab_size: int
    ) -> tuple[Tensor, tuple[TopLogprobs, Tensor]]:
        """Span log-probs, and the largest log-probs with the response tokens of each sequence; without a gradient."""
        states = response_states(model, hidden_1TH, microbatch, vocab_size)
        group = parallel_state.get_tensor_model_parallel_group()
        found = top_logprobs(states.hidden_NH, states.weight_VH, states.labels_N, self.k, vocab_size, group)
        span_N = microbatch.span_ids[response_positions(microbatch)].long()
        return sum_by(found.label_N, span_N, microbatch.num_spans), (found, states.lengths_R)


def _pairs(microbatch: Microbatch, found: tuple[TopLogprobs, Tensor]) -> list[tuple[int, Arrays]]:
    """Dataset row and arrays of the chosen response of each pair."""
    top, lengths_R = found
    tail_N = (1 - top.top_NK.exp().sum(dim=1)).clamp(min=0)
    fields = (top.top_NK, top.ids_NK.to(torch.int32), tail_N)
    split = [[part.cpu().numpy() for part in field.split(lengths_R.tolist())] for field in fields]
    return [
        (int(row), tuple(np.ascontiguousarray(field[response]) for field in split))
        for row, response in zip(microbatch.pair_index.tolist(), microbatch.chosen.tolist(), strict=True)
    ]
