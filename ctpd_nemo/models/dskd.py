"""Dual-space distillation with cross-model attention (Zhang et al. 2024, 2025); the loss is ``losses.dskd``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.dskd import PROJECTORS, Projectors, cross_attention, divergence, unit_deviation
from ctpd_nemo.losses.whole_logits import WholeLogits, loss_of_logits
from ctpd_nemo.models.distillation import DistillationConfig, DistillationModel, Terms, check_positive, tensor_group
from ctpd_nemo.models.response_states import ResponseStates, response_positions
from ctpd_nemo.parallel.layout import local_device


@dataclass
class DSKDConfig(DistillationConfig):
    """DSKD; the values are those of the authors' release.

    Attributes:
        distillation_weight: ``r``, the share of the distillation in the loss; the cross-entropy has the rest.
        temperature: Logits are divided by it in both divergences.
        projector_lr: Learning rate of the projectors after warm-up; the schedule is that of the student.
    """

    name: str = "dskd"
    distillation_weight: float = 0.5
    temperature: float = 2.0
    projector_lr: float = 1e-3

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        if self.reference == "cache":
            raise InputError("method.reference", "cache", "online: DSKD needs the teacher's hidden states")
        super().check()
        check_positive(self, "temperature", "projector_lr")
        if not 0 < self.distillation_weight <= 1:
            raise InputError("method.distillation_weight", str(self.distillation_weight), "a share above 0, at most 1")


class DSKD(DistillationModel):
    """The student, and on its last pipeline stage the projectors between it and the teacher."""

    metric_names = ("loss", "cross_entropy", "distillation", "projection_accuracy")

    def extend(self, chunks: list[GPTModel]) -> None:
        """Give the chunk with the output layer the projectors, whole on every tensor-parallel rank."""
        last = chunks[-1]
        if last.post_process:
            teacher = read_architecture(self.teacher_path)
            sizes = self.architecture.hidden_size, teacher.hidden_size
            projectors = Projectors(*sizes, self.run.seed, self.run.precision.torch_dtype())
            last.add_module(PROJECTORS, projectors.to(local_device()))

    def learning_rates(self) -> dict[str, float]:
        """That of the projectors."""
        return {f"*{PROJECTORS}.*": self.run.method.projector_lr}

    def prepare_step(self, batch: StepBatch) -> None:
        """The teacher's pass over the step, and the embeddings of both sides' tokens."""
        super().prepare_step(batch)
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                # What the last step updated is gathered by the forward pass, which has not begun.
                chunk.start_param_sync(force_sync=True)
        sides = (
            (self.chunks, batch.microbatches, self.architecture),
            (self.teacher.chunks, batch.reference_microbatches, self.teacher.architecture),
        )
        dtype, device = self.run.precision.torch_dtype(), local_device()
        embeddings = [
            token_embeddings(chunks, microbatches, torch.empty(model.hidden_size, dtype=dtype, device=device))
            for chunks, microbatches, model in sides
        ]
        self._embeddings = dict(zip(batch.microbatches, zip(*embeddings, strict=True), strict=True))

    def terms(self, student: ResponseStates, microbatch: Microbatch) -> Terms:
        """Cross-entropy, and the losses of both spaces."""
        method, group = self.run.method, tensor_group()
        teacher = self.teacher_states(microbatch)
        # Both lie whole on every rank; the losses give each rank's share of their gradients, which are summed here.
        t2s_NH, s2t_MH = map(copy_to_tensor_model_parallel_region, self._exchanged(student, teacher, microbatch))
        read_student = WholeLogits(student.weight_VH, student.vocab_size, group)
        read_teacher = WholeLogits(teacher.weight_VH, teacher.vocab_size, group)

        def student_space(logits_CV: Tensor, part: slice) -> Tensor:
            labels_C = student.labels_N[part]
            with torch.no_grad():
                target_CV = read_student(t2s_NH[part])
                right_C = target_CV.argmax(dim=1) == labels_C
            entropy = F.cross_entropy(logits_CV, labels_C, reduction="sum")
            pulled = (divergence(target_CV, logits_CV, method.temperature) * right_C).sum()
            mixed = (1 - method.distillation_weight) * entropy + method.distillation_weight * pulled
            return torch.stack([mixed, entropy, pulled, right_C.sum()])

        def projection(logits_CV: Tensor, part: slice) -> Tensor:
            return F.cross_entropy(logits_CV, student.labels_N[part], reduction="sum")[None]

        def teacher_space(logits_CV: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target_CV = read_teacher(teacher.hidden_NH[part])
            return divergence(target_CV, logits_CV, method.temperature).sum()[None]

        in_student = student.weight_VH, student.vocab_size, group
        mixed, sums_4 = loss_of_logits(student_space, 4, student.hidden_NH, *in_student)
        frozen_student = student.weight_VH.detach(), student.vocab_size, group
        projected, _ = loss_of_logits(projection, 1, t2s_NH, *frozen_student)
        pulled, _ = loss_of_logits(teacher_space, 1, s2t_MH, teacher.weight_VH, teacher.vocab_size, group)
        total = mixed + method.distillation_weight * (projected + pulled)
        distillation = sums_4[2] + projected.detach() + pulled.detach()
        return Terms(total, sums_4[1], distillation, {"projection_accuracy": sums_4[3]})

    def _exchanged(
        self, student: ResponseStates, teacher: ResponseStates, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        """The teacher in the student's space ``[N, H_S]``, the student in the teacher's space ``[M, H_T]``.

        Differentiable in the projectors and the student's hidden states, alike on every tensor-parallel rank.
        """
        projectors = unwrap_model(self.chunks[-1]).get_submodule(PROJECTORS)
        embedded = self._embeddings.get(microbatch)
        if embedded is None:
            widths = student.hidden_NH.shape[1], teacher.hidden_NH.shape[1]
            embedded = tuple(student.hidden_NH.new_zeros(2, 0, width) for width in widths)
        student_2NH, teacher_2MH = embedded
        student_R, teacher_R = student.lengths_R.tolist(), teacher.lengths_R.tolist()
        query_NE = projectors.query(torch.cat([*student_2NH], dim=1)).float()
        student_value_NT = projectors.s2t(_ShareOfGradient.apply(student.hidden_NH, tensor_group().size())).float()
        keys, values = [], []
        for hidden_mH, token_2mH in zip(
            teacher.hidden_NH.split(teacher_R), teacher_2MH.split(teacher_R, dim=1), strict=True
        ):
            keys.append(unit_deviation(torch.cat([*token_2mH], dim=1)))
            values.append(unit_deviation(hidden_mH) + unit_deviation(token_2mH[1]))
        teacher_value_MS = projectors.t2s(torch.cat(values).to(student.hidden_NH.dtype)).float()
        responses = zip(
            query_NE.split(student_R),
            keys,
            student_value_NT.split(student_R),
            teacher_value_MS.split(teacher_R),
            strict=True,
        )
        t2s, s2t = zip(*(cross_attention(*response) for response in responses), strict=True)
        return torch.cat(t2s).to(student.hidden_NH.dtype), torch.cat(s2t).to(teacher.hidden_NH.dtype)


class _ShareOfGradient(torch.autograd.Function):
    """The identity; gradients that are whole on every rank become shares, which the way out of the model sums."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden_NH.view_as(hidden_NH)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        return grad_NH / ctx.ranks, None


@torch.no_grad()
def token_embeddings(chunks: Sequence[Any], microbatches: Sequence[Microbatch], like: Tensor) -> list[Tensor]:
    """Embeddings of the input and the label of each response token, on every rank of the pipeline.

    Looked up on the first stage, where the embedding is, and sent to the others; all ranks call it together.

    Args:
        chunks: Of the model, with or without wrappers.
        microbatches: Of its tokens.
        like: An empty tensor ``[H]`` of the dtype and on the device of the embedding.

    Returns:
        For each microbatch ``[2, N, H]``, without a gradient.
    """
    words = []
    for microbatch in microbatches:
        position_N = response_positions(microbatch)
        words.append(torch.stack([microbatch.tokens[position_N], microbatch.labels[position_N]]))
    words_2N = torch.cat(words, dim=1)
    first = unwrap_model(chunks[0])
    if first.pre_process:
        found_2NH = _embed(words_2N, first.embedding.word_embeddings.weight)
    else:
        found_2NH = like.new_empty((*words_2N.shape, len(like)))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_first_rank()
        dist.broadcast(found_2NH, source, group=parallel_state.get_pipeline_model_parallel_group())
    return list(found_2NH.split([part.shape[1] for part in words], dim=1))


def _embed(words: Tensor, weight_VH: Tensor) -> Tensor:
    """Rows of an embedding that lies in equal shares over the tensor-parallel group, ``[..., H]``."""
    group = tensor_group()
    own = words - group.rank() * len(weight_VH)
    mine = (own >= 0) & (own < len(weight_VH))
    rows = F.embedding(own.masked_fill(~mine, 0), weight_VH) * mine[..., None]
    dist.all_reduce(rows, group=group)
    return rows
