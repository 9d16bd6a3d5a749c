"""The microbatch: sequences of several pairs, and the index of the span that each position predicts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctpd_nemo.data.encoded_pair import EncodedPair, Responses, SideName, SideTokens
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.data.packing import round_up, whole_multiple
from ctpd_nemo.errors import InputError

Float32Array = NDArray[np.float32]

_NOTHING = -1
_FIELDS = {
    torch.int64: ("tokens", "position_ids", "labels", "pair_index"),
    torch.int32: ("span_ids", "cu_seqlens", "span_response", "chosen", "rejected"),
    torch.float32: ("span_weights", "reference_logprobs"),
}


class SpanScores(Protocol):
    """Scores of the spans of every pair: what the span score cache gives, or draws that weights are made of later.

    Attributes:
        fingerprint: A name for the content of all of them.
        of_numbers: Whether they know a pair by its number in the training data, as those of a cache do.
    """

    fingerprint: str
    of_numbers: bool

    def lookup(self, pair: EncodedPair) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
        """Reference log-probs of chosen and rejected, then importance weights of both; f32 ``[n_spans]`` each."""
        ...


class Renumbered:
    """Scores of the pairs of one dataset, looked up by pairs of another that are among them."""

    def __init__(self, scores: Any, scored: Sequence[PreferencePair], numbers: NDArray[np.int64]) -> None:
        """Args:
        scores: ``SpanScores``, or a ``TopKSource``.
        scored: The pairs that these are of.
        numbers: Of each pair of the other dataset its number among them, int64 ``[n]``.
        """
        self._scores, self._scored, self._numbers = scores, scored, numbers

    def lookup(self, pair: EncodedPair) -> Any:
        """What the scores say of the pair that is meant."""
        number = int(self._numbers[pair.index])
        return self._scores.lookup(dataclasses.replace(pair, index=number, id=self._scored[number].id))


@dataclass(eq=False)
class Microbatch:
    """S sequences laid end to end over T tokens, with the R responses of P pairs, cut into N spans.

    The fields of one dtype are views of one buffer: a microbatch is pickled, pinned and moved as three tensors.

    Attributes:
        tokens: int64 ``[T]``, the tokens of all sequences, padding included.
        position_ids: int64 ``[T]``, from 0 in every sequence.
        labels: int64 ``[T]``, the next token wherever that is a response token of the same sequence, else -1 (no loss).
        span_ids: int32 ``[T]``, the span of that next token, counted over the microbatch; -1 where ``labels`` is.
        cu_seqlens: int32 ``[S + 1]``, where sequences begin and end; the padding behind a sequence belongs to it.
        span_response: int32 ``[N]``, the response of every span, ascending.
        span_weights: f32 ``[N]``, importance weights; 1 where the method has none. Where they are made as training
            goes, the numbers they are drawn by, until then.
        reference_logprobs: f32 ``[N]``, ``log pi_ref`` of every span; 0 where there is none.
        chosen: int32 ``[P]``, the chosen response of every pair.
        rejected: int32 ``[P]``, the rejected response of every pair; ``[0]`` where only chosen ones are here (SFT).
        pair_index: int64 ``[P]``, the row of every pair in the dataset.
        max_seqlen: Tokens of the longest sequence, padding included.
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    span_ids: Tensor
    cu_seqlens: Tensor
    span_response: Tensor
    span_weights: Tensor
    reference_logprobs: Tensor
    chosen: Tensor
    rejected: Tensor
    pair_index: Tensor
    max_seqlen: int

    def __post_init__(self) -> None:
        for dtype, names in _FIELDS.items():
            for name in names:
                if getattr(self, name).dtype != dtype:
                    raise TypeError(f"{name} is {getattr(self, name).dtype}, not {dtype}")
        sizes = {name: len(getattr(self, name)) for names in _FIELDS.values() for name in names}
        self._adopt([torch.cat([getattr(self, name) for name in names]) for names in _FIELDS.values()], sizes)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.tokens)

    @property
    def num_pairs(self) -> int:
        """P; 0 in a filler."""
        return len(self.pair_index)

    @property
    def num_responses(self) -> int:
        """R: two a pair, one a pair where only chosen responses are here."""
        return len(self.chosen) + len(self.rejected)

    @property
    def num_spans(self) -> int:
        """N, over all responses."""
        return len(self.span_response)

    @classmethod
    def filler(cls, num_tokens: int, pad_token_id: int) -> "Microbatch":
        """One sequence of padding and no pairs, for a data-parallel rank that has none in a step."""
        bounds = np.array([0, num_tokens])
        return _lay_out([], [], bounds, pad_token_id, responses=("chosen", "rejected"), scores=None)

    def pin_memory(self) -> "Microbatch":
        """A copy in page-locked memory; the data loader calls it where there is a GPU."""
        return _restore([buffer.pin_memory() for buffer in self._buffers], self._sizes, self.max_seqlen)

    def to(self, device: torch.device | str) -> "Microbatch":
        """A copy on a device; from page-locked memory without waiting for it."""
        moved = [buffer.to(device, non_blocking=True) for buffer in self._buffers]
        return _restore(moved, self._sizes, self.max_seqlen)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._buffers, self._sizes, self.max_seqlen)

    def _adopt(self, buffers: list[Tensor], sizes: dict[str, int]) -> None:
        """Make every field a view of its dtype's buffer."""
        self._buffers, self._sizes = buffers, sizes
        for names, buffer in zip(_FIELDS.values(), buffers, strict=True):
            for name, view in zip(names, buffer.split([sizes[name] for name in names]), strict=True):
                setattr(self, name, view)


def _restore(buffers: list[Tensor], sizes: dict[str, int], max_seqlen: int) -> Microbatch:
    microbatch = object.__new__(Microbatch)
    microbatch.max_seqlen = max_seqlen
    microbatch._adopt(buffers, sizes)
    return microbatch


def build_microbatch(
    pairs: Sequence[EncodedPair],
    *,
    pad_token_id: int,
    side: SideName = "policy",
    responses: Responses = ("chosen", "rejected"),
    scores: SpanScores | None = None,
    pad_to_multiple: int = 1,
    sequence_multiple: int = 1,
    padding: str = "packed",
) -> Microbatch:
    """Lay the responses of pairs end to end, the responses of a pair one after the other.

    Args:
        pairs: At least one.
        pad_token_id: Any id of the vocabulary; nothing tells padding by it.
        side: Whose tokens. Spans, responses and pairs are numbered alike on both sides.
        responses: Both responses of every pair, or the chosen ones alone.
        scores: Span scores by pair id; without them reference log-probs are 0 and weights 1.
        pad_to_multiple: T is a multiple of this (sequence parallelism, FP8).
        sequence_multiple: The length of every sequence is a multiple of this (context parallelism).
        padding: "packed" pads the last sequence on, until T is a multiple of both; "padded" pads every sequence to
            one length that is.

    Raises:
        InputError: The scores of a pair are of another number of spans.
    """
    if not pairs:
        raise ValueError("no pairs; Microbatch.filler makes a microbatch without any")
    if padding not in ("packed", "padded"):
        raise ValueError(f"padding is {padding!r}, not 'packed' or 'padded'")
    sequences = [response.side(side) for pair in pairs for response in pair.responses(responses)]
    lengths = np.array([round_up(len(sequence), sequence_multiple) for sequence in sequences])
    multiple = whole_multiple(pad_to_multiple, sequence_multiple)
    if padding == "padded":
        lengths[:] = round_up(int(lengths.max()), multiple)
    else:
        lengths[-1] += round_up(int(lengths.sum()), multiple) - lengths.sum()
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return _lay_out(pairs, sequences, bounds, pad_token_id, responses, scores)


def _lay_out(
    pairs: Sequence[EncodedPair],
    sequences: Sequence[SideTokens],
    bounds: NDArray[np.int64],
    pad_token_id: int,
    responses: Responses,
    scores: SpanScores | None,
) -> Microbatch:
    """Fill the buffers; sequence s takes the tokens ``bounds[s]:bounds[s + 1]`` and holds ``sequences[s]``."""
    n_spans = [response.n_spans for pair in pairs for response in pair.responses(responses)]
    first_span = np.concatenate([[0], np.cumsum(n_spans, dtype=np.int64)])
    tokens = np.full(bounds[-1], pad_token_id, dtype=np.int64)
    labels = np.full(bounds[-1], _NOTHING, dtype=np.int64)
    span_ids = np.full(bounds[-1], _NOTHING, dtype=np.int32)
    for number, sequence in enumerate(sequences):
        begin = bounds[number]
        split, end = begin + len(sequence.prompt_ids), begin + len(sequence)
        tokens[begin:split] = sequence.prompt_ids
        tokens[split:end] = sequence.response_ids
        # A position predicts the token behind it: the prompt's last token predicts the response's first.
        labels[split - 1 : end - 1] = sequence.response_ids
        span_ids[split - 1 : end - 1] = sequence.response_span + first_span[number]
    lengths = np.diff(bounds)
    first_response = np.arange(len(pairs), dtype=np.int32) * len(responses)
    references, weights = _scores_of(pairs, responses, n_spans, scores)
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)),
        labels=torch.from_numpy(labels),
        span_ids=torch.from_numpy(span_ids),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        span_response=torch.from_numpy(np.repeat(np.arange(len(n_spans), dtype=np.int32), n_spans)),
        span_weights=torch.from_numpy(weights),
        reference_logprobs=torch.from_numpy(references),
        chosen=torch.from_numpy(first_response),
        rejected=torch.from_numpy(first_response + 1 if "rejected" in responses else first_response[:0]),
        pair_index=torch.from_numpy(np.array([pair.index for pair in pairs], dtype=np.int64)),
        max_seqlen=int(lengths.max()),
    )


def _scores_of(
    pairs: Sequence[EncodedPair], responses: Responses, n_spans: list[int], scores: SpanScores | None
) -> tuple[Float32Array, Float32Array]:
    """Reference log-probs and weights of all spans, f32 ``[N]`` each."""
    if scores is None or not pairs:
        return np.zeros(sum(n_spans), dtype=np.float32), np.ones(sum(n_spans), dtype=np.float32)
    references, weights = [], []
    for pair in pairs:
        looked_up = scores.lookup(pair)
        for name, response, reference, weight in zip(
            responses, pair.responses(responses), looked_up[:2], looked_up[2:], strict=False
        ):
            if not len(reference) == len(weight) == response.n_spans:
                found = f"{len(reference)} reference log-probs and {len(weight)} weights of the {name} response"
                raise InputError(f"scores of pair {pair.id!r}", found, f"{response.n_spans} of each, one a span")
            references.append(reference)
            weights.append(weight)
    return np.concatenate(references).astype(np.float32), np.concatenate(weights).astype(np.float32)
