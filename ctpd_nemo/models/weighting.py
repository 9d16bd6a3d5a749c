"""How a run weighs spans: which scores it asks for, and what it makes of them, cached or beside the policy alike."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse
from ctpd_nemo.losses.spans import sum_by
from ctpd_nemo.losses.weights import (
    average_weights,
    constant_weights,
    draw,
    exponential_weights,
    shuffled_weights,
)

Float32Array = NDArray[np.float32]

# By weighting, the roles of its log-ratio: the first less the second, or one that is a ratio itself.
WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "contrastive_teacher": ("positive", "negative"),
    "contrastive_student": ("student_positive", "student_negative"),
    "teacher_student": ("reference", "student"),
    "single_teacher": ("margin",),
    "average": ("positive", "negative"),
    "constant": ("positive", "negative"),
    "shuffled": ("positive", "negative"),
    "random": (),
    "uniform": (),
}
_DRAWN = ("random", "shuffled")


@dataclass(frozen=True)
class Spans:
    """What a weighting may know of S spans beside their scores.

    Attributes:
        response_S: The response of each span, int64, ascending.
        num_responses: How many responses there are.
        sign_S: +1 in a chosen response, -1 in a rejected one, fp32.
        length_S: Tokens of the reference in each span, fp32.
        draw_S: Numbers from U(-1, 1) of each span, fp32; read by weightings that draw.
    """

    response_S: Tensor
    num_responses: int
    sign_S: Tensor
    length_S: Tensor
    draw_S: Tensor

    @classmethod
    def of_microbatch(cls, microbatch: Microbatch, reference: Microbatch) -> "Spans":
        """Those of a microbatch whose weights hold draws still.

        Args:
            microbatch: The policy's.
            reference: The same pairs as the reference reads them.
        """
        sign_R = microbatch.span_weights.new_ones(microbatch.num_responses)
        sign_R[microbatch.rejected.long()] = -1.0
        response_S = microbatch.span_response.long()
        span_N = reference.span_ids[reference.span_ids >= 0].long()
        length_S = sum_by(torch.ones_like(span_N, dtype=torch.float32), span_N, reference.num_spans)
        return cls(response_S, len(sign_R), sign_R[response_S], length_S, microbatch.span_weights.clone())


@dataclass(frozen=True)
class Weighting:
    """A weighting and its numbers.

    Attributes:
        name: One of ``WEIGHTINGS``.
        scale: ``k``.
        lower: ``L``, in nats.
        upper: ``U``, in nats.
        seed: What drawn numbers depend on beside pair and response.
        shared_ids: Ids that several pairs have, and so do not tell draws apart.
    """

    name: str = "uniform"
    scale: float = 1.0
    lower: float = -0.5
    upper: float = 1.5
    seed: int = 0
    shared_ids: frozenset[str] = frozenset()

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose scores it needs."""
        return WEIGHTINGS[self.name]

    @property
    def draws(self) -> bool:
        """Whether it depends on drawn numbers."""
        return self.name in _DRAWN

    def weights(self, scores: Mapping[str, Tensor], spans: Spans) -> Tensor:
        """The weight of each span, fp32 ``[S]``.

        Args:
            scores: By role, fp32 ``[S]`` each.
            spans: What else there is to know.
        """
        if self.name == "uniform":
            return torch.ones_like(spans.sign_S)
        if self.name == "random":
            return spans.draw_S
        ratio_S, *less = (scores[role] for role in self.roles)
        if less:
            ratio_S = ratio_S - less[0]
        weights_S = exponential_weights(ratio_S, spans.sign_S, self.scale, self.lower, self.upper)
        if self.name == "average":
            return average_weights(weights_S, spans.length_S)
        if self.name == "constant":
            return constant_weights(weights_S, spans.response_S, spans.num_responses)
        if self.name == "shuffled":
            return shuffled_weights(weights_S, spans.draw_S, spans.response_S)
        return weights_S

    def pair_weights(
        self, scores: Mapping[str, tuple[Float32Array, Float32Array]], pair: EncodedPair
    ) -> tuple[Float32Array, Float32Array]:
        """The weights of chosen and rejected of one pair, f32 ``[n_spans]`` each, from scores of both by role."""
        sizes = [pair.chosen.n_spans, pair.rejected.n_spans]
        response_S = torch.tensor([0, 1]).repeat_interleave(torch.tensor(sizes))
        draws = pair_draws(self.seed, pair, self.shared_ids) if self.draws else [torch.zeros(size) for size in sizes]
        lengths = [torch.from_numpy(_lengths(response)) for response in (pair.chosen, pair.rejected)]
        spans = Spans(response_S, 2, (1.0 - 2.0 * response_S).float(), torch.cat(lengths), torch.cat(draws))
        both = {role: torch.from_numpy(np.concatenate(scored)) for role, scored in scores.items()}
        chosen, rejected = self.weights(both, spans).split(sizes)
        return chosen.numpy(), rejected.numpy()


def _lengths(response: EncodedResponse) -> Float32Array:
    """Tokens of the reference in each span, f32 ``[n_spans]``."""
    return np.bincount(response.reference.response_span, minlength=response.n_spans).astype(np.float32)


def pair_draws(seed: int, pair: EncodedPair, shared_ids: Collection[str] = ()) -> list[Tensor]:
    """Numbers from U(-1, 1) for every span of chosen and of rejected, fp32 ``[n_spans]`` each.

    Args:
        seed: Of the run.
        pair: Which pair.
        shared_ids: Ids that several pairs have; these are told apart by their numbers in the dataset.
    """
    responses = {"chosen": pair.chosen, "rejected": pair.rejected}
    name_of_pair = f"{pair.id}\0{pair.index}" if pair.id in shared_ids else pair.id
    return [draw(seed, name_of_pair, name, response.n_spans) for name, response in responses.items()]


class SpanDraws:
    """Scores of no model: numbers from U(-1, 1) in the place of weights, for a method that scores as it goes.

    Attributes:
        fingerprint: What the numbers depend on beside the pairs.
        of_numbers: They can be drawn for any pair.
    """

    of_numbers = False

    def __init__(self, seed: int, shared_ids: Collection[str] = ()) -> None:
        self.fingerprint = f"draws of seed {seed}"
        self._seed = seed
        self._shared_ids = shared_ids

    def lookup(self, pair: EncodedPair) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
        """Reference log-probs of zero, then the draws, of chosen and rejected."""
        chosen, rejected = (numbers.numpy() for numbers in pair_draws(self._seed, pair, self._shared_ids))
        return np.zeros_like(chosen), np.zeros_like(rejected), chosen, rejected
