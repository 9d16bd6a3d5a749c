"""The data loader: one item is one optimizer step's microbatches of one data-parallel rank.

Workers read, encode, pack and build. Every item is a function of its step alone, so neither the number of workers nor
an interruption changes what a step sees.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ctpd_nemo.data.balance import even_out, split_by_rank
from ctpd_nemo.data.batch import Microbatch, SpanScores, build_microbatch
from ctpd_nemo.data.cost import SequenceCost
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset
from ctpd_nemo.data.encoded_pair import EncodedPair, Responses, SideName, Skipped
from ctpd_nemo.data.packing import check_budget, pack, pack_padded, round_up, whole_multiple
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.data.source import PairSource, TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.top_k import TopK, TopKSource, build_top_k
from ctpd_nemo.data.workers import WorkerLoader
from ctpd_nemo.errors import InputError

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Batching:
    """How the pairs of a step become microbatches.

    Attributes:
        microbatch_tokens: The token budget, padding included; at least two sequences of the encoder's ``max_length``.
        side: Whose tokens: the policy's to train it, the reference's to score it.
        online: Also build the reference's microbatches of the same pairs, for a teacher beside the student.
        responses: Both responses, or the chosen ones alone (SFT).
        padding: "packed" or "padded"; see ``build_microbatch``.
        pad_to_multiple: The tokens of every microbatch are a multiple of this.
        sequence_multiple: The tokens of every sequence are a multiple of this, padding included.
        cost: What sequences cost on the model of ``side``; ranks and microbatches are balanced by it.
    """

    microbatch_tokens: int
    side: SideName = "policy"
    online: bool = False
    responses: Responses = ("chosen", "rejected")
    padding: str = "packed"
    pad_to_multiple: int = 1
    sequence_multiple: int = 1
    cost: SequenceCost = field(default_factory=SequenceCost)

    @property
    def whole_multiple(self) -> int:
        """What the tokens of a microbatch are a multiple of: both."""
        return whole_multiple(self.pad_to_multiple, self.sequence_multiple)


@dataclass
class StepStats:
    """What went into one rank's share of a step; shares and steps add up.

    Attributes:
        pairs: Pairs in the microbatches.
        truncated: Responses whose end was cut off.
        skipped: Pairs left out, by reason; the global batch is smaller by them.
        differing: Responses that are not as a template writes them, by ``encode.DIFFERENCES``.
        tokens: Tokens of the sequences, without padding.
        response_tokens: Those of them that have a loss.
        padding: Tokens of padding.
    """

    pairs: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    response_tokens: int = 0
    padding: int = 0
    differing: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "StepStats") -> "StepStats":
        return StepStats(
            self.pairs + other.pairs,
            self.truncated + other.truncated,
            self.skipped + other.skipped,
            self.tokens + other.tokens,
            self.response_tokens + other.response_tokens,
            self.padding + other.padding,
            self.differing + other.differing,
        )

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.skipped.most_common())
        skipped = f"{self.skipped.total()} skipped" + (f" ({reasons})" if reasons else "")
        told = f"{self.pairs} pairs, {skipped}, {self.truncated} responses truncated"
        if not self.differing:
            return told
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.differing.most_common())
        return f"{told}, responses not as a chat template writes them: {kinds}"


@dataclass
class StepBatch:
    """One rank's share of one step.

    Attributes:
        step: From 0, over the whole run.
        epoch: From 0.
        microbatches: At least one; a rank without a pair has a filler.
        reference_microbatches: The reference's, pair by pair like ``microbatches``; empty unless asked for.
        top_k: What the teacher finds most likely at each token of these microbatches; empty unless asked for.
        skipped: The pairs left out.
        stats: Counts of this share.
        wait_seconds: How long the loader was waited for; that of its first step holds the start of the workers.
    """

    step: int
    epoch: int
    microbatches: list[Microbatch]
    reference_microbatches: list[Microbatch]
    skipped: list[Skipped]
    stats: StepStats
    wait_seconds: float = 0.0
    top_k: list[TopK] = field(default_factory=list)

    def pin_memory(self) -> "StepBatch":
        """Page-lock the microbatches; the data loader calls it where there is a GPU."""
        self.microbatches = [microbatch.pin_memory() for microbatch in self.microbatches]
        self.reference_microbatches = [microbatch.pin_memory() for microbatch in self.reference_microbatches]
        self.top_k = [top_k.pin_memory() for top_k in self.top_k]
        return self


class StepDataset(Dataset[StepBatch | InputError]):
    """Steps by number, for one data-parallel rank."""

    def __init__(
        self,
        dataset: PreferenceDataset,
        encoder: PairEncoder,
        plan: StepPlan,
        batching: Batching,
        scores: SpanScores | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
        encoded: EncodedDataset | None = None,
        top_k: TopKSource | None = None,
    ) -> None:
        check_budget(
            batching.microbatch_tokens,
            encoder.max_length,
            batching.pad_to_multiple,
            batching.sequence_multiple,
            batching.padding,
        )
        if plan.n_pairs != len(dataset):
            raise ValueError(f"a plan for {plan.n_pairs} pairs and a dataset of {len(dataset)}")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        self._source: PairSource = TextSource(dataset, encoder) if encoded is None else encoded
        self._encoder = encoder
        self._plan = plan
        self._batching = batching
        self._scores = scores
        self._top_k = top_k
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> StepBatch | InputError:
        """Build one step. An ``InputError`` is returned and raised by the loader: what workers raise becomes text."""
        try:
            return self._build(step)
        except InputError as error:
            return error

    def prepare(self) -> None:
        """Build what forked workers can share."""
        self._source.prepare(lengths=self._dp_size > 1)

    def _build(self, step: int) -> StepBatch:
        epoch, batch = self._plan.batch(step)
        encoded = self._source.pairs(self._share(batch.tolist()))
        pairs = [pair for pair in encoded if isinstance(pair, EncodedPair)]
        skipped = [pair for pair in encoded if isinstance(pair, Skipped)]
        groups = self._pack(pairs)
        microbatches = self._microbatches(groups, self._batching.side)
        references = self._microbatches(groups, "reference") if self._batching.online else []
        stats = self._stats(pairs, skipped, microbatches)
        built = StepBatch(step, epoch, microbatches, references, skipped, stats)
        if self._top_k is not None:
            built.top_k = [build_top_k(group, self._top_k) for group in groups]
        return built

    def _share(self, batch: list[int]) -> list[int]:
        """This rank's rows of a global batch; every rank finds the same split without encoding the others' pairs."""
        if self._dp_size == 1:
            return batch
        lengths_PR, response_PR = self._source.lengths(batch, self._batching.side, self._batching.responses)
        ranks = split_by_rank(*self._costs(lengths_PR, response_PR), self._dp_size)
        return [batch[number] for number in ranks[self._dp_rank]]

    def _costs(self, lengths_PR: Int64Array, response_PR: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Cost of each pair and of which the attention, int64 ``[P]`` each."""
        cost = self._batching.cost
        return cost.of(lengths_PR, response_PR).sum(axis=1), cost.query_key_pairs(lengths_PR).sum(axis=1)

    def _pack(self, pairs: list[EncodedPair]) -> list[list[EncodedPair]]:
        batching = self._batching
        if not pairs:
            return []
        sides: list[SideName] = [batching.side, "reference"] if batching.online else [batching.side]
        # Both sides' microbatches hold the same pairs, so a pair is as long as it is on its longer side.
        lengths_PSR = np.array([[self._lengths(pair, side) for side in sides] for pair in pairs], dtype=np.int64)
        if batching.padding == "packed":
            tokens_P = lengths_PSR.sum(axis=2).max(axis=1)
            groups = pack(tokens_P, batching.microbatch_tokens)
            costs = self._costs(lengths_PSR[:, 0], self._response_lengths(pairs))
            groups = even_out(groups, *costs, tokens_P, batching.microbatch_tokens)
        else:
            longest_P = [round_up(length, batching.whole_multiple) for length in lengths_PSR.max(axis=(1, 2)).tolist()]
            groups = pack_padded(np.multiply(longest_P, len(batching.responses)), batching.microbatch_tokens)
        return [[pairs[number] for number in group] for group in groups]

    def _lengths(self, pair: EncodedPair, side: SideName) -> list[int]:
        """Tokens of a pair's sequences, each with the padding that it always takes along."""
        multiple = self._batching.sequence_multiple
        return [round_up(len(response.side(side)), multiple) for response in pair.responses(self._batching.responses)]

    def _response_lengths(self, pairs: list[EncodedPair]) -> Int64Array:
        responses_PR = [pair.responses(self._batching.responses) for pair in pairs]
        side = self._batching.side
        return np.array([[len(one.side(side).response_ids) for one in row] for row in responses_PR], dtype=np.int64)

    def _microbatches(self, groups: list[list[EncodedPair]], side: SideName) -> list[Microbatch]:
        batching = self._batching
        pad = (self._encoder.policy if side == "policy" else self._encoder.reference).pad_token_id
        if not groups:
            return [Microbatch.filler(batching.whole_multiple, pad)]
        return [
            build_microbatch(
                group,
                pad_token_id=pad,
                side=side,
                responses=batching.responses,
                scores=self._scores if side == batching.side else None,
                pad_to_multiple=batching.pad_to_multiple,
                sequence_multiple=batching.sequence_multiple,
                padding=batching.padding,
            )
            for group in groups
        ]

    def _stats(self, pairs: list[EncodedPair], skipped: list[Skipped], microbatches: list[Microbatch]) -> StepStats:
        responses = [response for pair in pairs for response in pair.responses(self._batching.responses)]
        sequences = [response.side(self._batching.side) for response in responses]
        tokens = sum(map(len, sequences))
        return StepStats(
            pairs=len(pairs),
            truncated=sum(response.truncated for response in responses),
            skipped=Counter(pair.reason for pair in skipped),
            tokens=tokens,
            response_tokens=sum(len(sequence.response_ids) for sequence in sequences),
            padding=sum(microbatch.num_tokens for microbatch in microbatches) - tokens,
            differing=Counter(kind for response in responses for kind in response.differences),
        )


class StepLoader(WorkerLoader[StepBatch]):
    """A loader of steps that says of each how long it was waited for."""

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]
        steps = super().__iter__()
        while True:
            asked = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            step.wait_seconds = time.perf_counter() - asked
            yield step


def build_step_loader(
    dataset: PreferenceDataset,
    encoder: PairEncoder,
    plan: StepPlan,
    batching: Batching,
    *,
    scores: SpanScores | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    encoded: EncodedDataset | None = None,
    top_k: TopKSource | None = None,
) -> StepLoader:
    """A loader of this rank's share of every step from ``start_step`` on.

    Args:
        dataset: Checked pairs.
        encoder: Renders and tokenizes them.
        plan: Which pairs each step sees; ``StepPlan.in_order`` for evaluation and scoring.
        batching: How they become microbatches.
        scores: Span scores for CTPD from the cache.
        dp_rank: This rank among the data-parallel ones.
        dp_size: How many those are.
        start_step: The first step to give, as if all before it had been given.
        num_workers: Worker processes; 0 does the work in this one.
        encoded: The same pairs as this encoder encodes them, read instead of encoded anew.
        top_k: What the teacher finds most likely, from the cache.

    Raises:
        InputError: The token budget does not hold a longest pair. While iterating: a row, template or score is bad.
    """
    steps = StepDataset(dataset, encoder, plan, batching, scores, dp_rank, dp_size, encoded, top_k)
    return StepLoader(
        steps,  # type: ignore[arg-type]
        sampler=range(start_step, len(steps)),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
