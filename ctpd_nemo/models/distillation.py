"""What the distillation baselines share: cross-entropy on chosen responses, and a term that pulls to the teacher.

The teacher's distributions come from the teacher beside the student (``reference: online``), or from a cache of its
largest log-probs at each token (``reference: cache``), which ``tools/score.py`` writes with ``method.top_k``.

Online costs the teacher's weights on every rank, its forward pass of the chosen responses (2 operations a weight and
token), ``H_T`` values a response token that stay for the step, and its output layer at those tokens (``2 H_T V_T``
operations each). The cache costs ``6 k + 4`` bytes a response token on disk (float16; ``8 k + 4`` in float32), and in
the memory of each training process the ``2 k + 4`` (``4 k + 4``) that are read of them; nothing is computed again.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from torch import Tensor

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.data.top_k import TopK
from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.top_logprobs import top_logprobs
from ctpd_nemo.models.base import MegatronModel
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.dpo import check_reference
from ctpd_nemo.models.folder import check_vocabulary
from ctpd_nemo.models.forward import OutputReader, StepLoss, output_weight
from ctpd_nemo.models.response_states import ResponseStates, response_lengths, response_states
from ctpd_nemo.models.teacher import FrozenModel


@dataclass
class DistillationConfig:
    """Where the teacher's distributions come from.

    Attributes:
        reference: "online" holds the teacher beside the student; "cache" reads ``scores``.
        scores: Cache written with ``top_k``, where ``reference`` is "cache".
        scoring_precision: The precision it was computed in; ``None`` for that of this run.
    """

    name: str = ""
    reference: str = "online"
    scores: str | None = None
    scoring_precision: str | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        check_reference(self.reference, self.scores)


def check_positive(config: DistillationConfig, *names: str) -> None:
    """Stop with an ``InputError`` where one of these values is not a positive number."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"method.{name}", str(getattr(config, name)), "a positive number")


@dataclass(frozen=True)
class Terms:
    """The loss of a microbatch: sums over tokens.

    Attributes:
        total: What is differentiated.
        cross_entropy: Of the labels, detached.
        distillation: The term that pulls to the teacher, detached.
        others: What else a method reports, detached.
    """

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)


class DistillationModel(MegatronModel):
    """A student trained on chosen responses beside its teacher; means are over its response tokens, as in SFT."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "distillation")
    shown_metrics = ("loss", "cross_entropy")

    def __init__(self, run: RunConfig, run_data: RunData, trainer: Trainer | None = None) -> None:
        """Args as those of ``MegatronModel``.

        Raises:
            InputError: There is no teacher.
        """
        super().__init__(run, run_data, trainer)
        self.vocab_sizes = [self.architecture.vocab_size]
        # The cache speaks for weights that are elsewhere.
        if run.method.reference == "online" or run.model.teacher.path is not None:
            teacher = read_architecture(self.teacher_path)
            check_vocabulary(run_data.encoder.reference, teacher.vocab_size, self.teacher_path)
            self.vocab_sizes.append(teacher.vocab_size)
        self._states: dict[Microbatch, ResponseStates] = {}
        self._top_k: dict[Microbatch, TopK] = {}

    @property
    def teacher_path(self) -> str:
        """The teacher's folder.

        Raises:
            InputError: The run names none.
        """
        path = self.run.model.teacher.path
        if path is None:
            raise InputError("model.teacher.path", "nothing", "a Hugging Face folder, as method.reference is online")
        return path

    @property
    def read_output(self) -> OutputReader:
        """Hidden states at response positions, and the output layer."""
        return response_states

    @abstractmethod
    def terms(self, student: ResponseStates, microbatch: Microbatch) -> Terms:
        """The loss of one microbatch, on the last pipeline stage."""

    def configure_model(self) -> None:
        """Build the student, and the teacher beside it where nothing is cached."""
        super().configure_model()
        if self.run.method.reference == "online" and not hasattr(self, "teacher"):
            self.teacher = FrozenModel(self.teacher_path, self.run.parallel, self.run.precision)

    def prepare_step(self, batch: StepBatch) -> None:
        """The teacher's pass over the step, or what the cache has of it."""
        if self.run.method.reference == "online":
            states = self.teacher.read(batch.reference_microbatches, response_states)
            self._states = dict(zip(batch.microbatches, states, strict=False))
        # A rank with fewer microbatches than others has fillers behind its own.
        self._top_k = dict(zip(batch.microbatches, batch.top_k, strict=False))

    def teacher_states(self, microbatch: Microbatch) -> ResponseStates:
        """The teacher's side of a microbatch; nothing at all for one that only fills up a group of the schedule."""
        states = self._states.get(microbatch)
        if states is not None:
            return states
        weight_VH = output_weight(self.teacher.chunks[-1])
        nothing = torch.zeros(0, dtype=torch.int64, device=weight_VH.device)
        lengths_R = response_lengths(microbatch)
        vocab_size = self.teacher.architecture.vocab_size
        return ResponseStates(weight_VH[:0], weight_VH, vocab_size, nothing, nothing, lengths_R)

    def teacher_top_k(self, microbatch: Microbatch, k: int) -> TopK:
        """The teacher's ``k`` largest log-probs at its response tokens of a microbatch; no rows for a filler."""
        if self.run.method.reference == "cache":
            cached = self._top_k.get(microbatch)
            nothing = microbatch.reference_logprobs.new_zeros(0, k)
            return cached.first(k) if cached else TopK(nothing, nothing.sum(dim=1), response_lengths(microbatch))
        states = self.teacher_states(microbatch)
        with torch.no_grad():
            found = top_logprobs(
                states.hidden_NH, states.weight_VH, states.labels_N, k, states.vocab_size, tensor_group()
            )
        return TopK(found.top_NK, 1 - found.top_NK.exp().sum(dim=1), states.lengths_R)

    def check_k(self, k: int, place: str) -> None:
        """Stop with an ``InputError`` where fewer than ``k`` words are known of one of the models."""
        cached = self.run_data.top_k
        if self.run.method.reference == "cache" and cached is not None and k > cached.k:
            raise InputError(place, str(k), f"at most {cached.k}, as many as the cache has of each token")
        if k > min(self.vocab_sizes):
            raise InputError(place, str(k), f"at most {min(self.vocab_sizes)}, the words of the smaller vocabulary")

    def microbatch_loss(self, policy_S: ResponseStates, microbatch: Microbatch) -> StepLoss:  # type: ignore[override]
        """The sums over the student's response tokens; context-parallel ranks share what is differentiated."""
        terms = self.terms(policy_S, microbatch)
        sums = {
            "loss": terms.total.detach(),
            "cross_entropy": terms.cross_entropy,
            "distillation": terms.distillation,
            **terms.others,
        }
        count = len(policy_S.labels_N)
        share = terms.total / parallel_state.get_context_parallel_world_size()
        return StepLoss(share, count, sums, dict.fromkeys(sums, count))


def tensor_group() -> torch.distributed.ProcessGroup:
    """The group over which vocabularies lie."""
    return parallel_state.get_tensor_model_parallel_group()
