r"""What the loss of a distillation baseline takes in place of log-probs: products, time, memory and communication.

Each loss makes some uses of the two output layers (``models.uld``, ``models.dskd``, ``models.multilevel_ot``). A use
multiplies the layer with hidden states of tokens once for their logits, and once each for the gradients of hidden
states and weight. Whole distributions lie on every rank of the tensor-parallel group, so what is computed of them is
computed on each; and as a loss needs whole responses, every context-parallel rank computes all of it.

Left out is what is small beside products with a vocabulary: the attention of DSKD between the tokens of a response, the
sequence level of multi-level optimal transport, sums over the k largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.losses import whole_logits
from ctpd_nemo.losses.dskd import PROJECTORS
from ctpd_nemo.losses.logprobs import CHUNK_LOGITS
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.batches import FloatArray, Load
from ctpd_nemo.planner.communication import Traffic
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.head import (
    CHUNK_GRADIENT_BYTES,
    HeadBytes,
    HeadSeconds,
    chunk_tokens,
    head_bytes,
    head_rate,
    vocabulary_rows,
)
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import Parameter
from ctpd_nemo.planner.shapes import Shape

# Bytes that operators read and write for every logit, both passes (``tests/planner/test_distillation.py`` counts them).
# A sort is counted as what it takes and gives, and goes through that once for each of the four bytes of a key.
TOP_K_BYTES, TOP_K_FORWARD_BYTES = 68, 32
ULD_STUDENT_BYTES, ULD_TEACHER_BYTES, SORT_BYTES = 180, 44, 64
DSKD_STUDENT_BYTES, DSKD_PROJECTION_BYTES, DSKD_TEACHER_BYTES = 180, 48, 128


@dataclass(frozen=True)
class Use:
    """One use that a loss makes of an output layer.

    Attributes:
        side: Whose layer and tokens: "student" or "teacher"; "paired" for the teacher's layer at those of the student's
            tokens that have one of the same number.
        products: With the layer: one for logits, and one for each gradient.
        again: Products of logits that are made a second time.
        logit_bytes: Moved by what is computed of a logit; 0 where another use of the same tokens has them.
        weight_gradient: Whether one of the products is that of the layer's gradient.
        whole: Whether the logits are gathered over the tensor-parallel group.
        buffers: Those as large as the logits of a chunk that stand at one time, by the storages of real steps; 0 where
            another use of the same tokens needs more.
    """

    side: str
    products: int
    again: int = 0
    logit_bytes: int = 0
    weight_gradient: bool = False
    whole: bool = True
    buffers: float = 0.0


# What the counts above do not have of a sort: its second to fourth time, of fp32 keys and int64 places.
_SORT_AGAIN = 3 * SORT_BYTES // 4

_USES = {
    "uld": (
        Use("student", 3, logit_bytes=ULD_STUDENT_BYTES + _SORT_AGAIN, weight_gradient=True, buffers=9.4),
        Use("paired", 1, logit_bytes=ULD_TEACHER_BYTES + _SORT_AGAIN, buffers=9.4),
    ),
    "dskd": (
        Use("student", 3, logit_bytes=DSKD_STUDENT_BYTES, weight_gradient=True, buffers=7.1),
        Use("student", 1),
        Use("student", 2, logit_bytes=DSKD_PROJECTION_BYTES, buffers=4.1),
        Use("teacher", 2, logit_bytes=DSKD_TEACHER_BYTES, buffers=7.1),
        Use("teacher", 1),
    ),
    "top_k": (
        Use("student", 3, again=1, logit_bytes=TOP_K_BYTES, weight_gradient=True, whole=False),
        Use("teacher", 1, logit_bytes=TOP_K_FORWARD_BYTES, whole=False),
    ),
}


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of a job.

    Attributes:
        name: "uld", "dskd" or "multilevel_ot".
        student: Sizes of the student.
        teacher: Sizes of the teacher; ``None`` where a cache has its largest log-probs.
        top_k: How many of the largest log-probs are compared; ``None`` for whole distributions.
    """

    name: str
    student: Architecture
    teacher: Architecture | None
    top_k: int | None = None

    @property
    def uses(self) -> tuple[Use, ...]:
        """Of the output layers."""
        kind = self.name if self.top_k is None else "top_k"
        return tuple(use for use in _USES[kind] if self.teacher is not None or use.side == "student")

    def model(self, use: Use) -> Architecture:
        """The model whose output layer is used."""
        if use.side == "student":
            return self.student
        assert self.teacher is not None
        return self.teacher

    @property
    def widths(self) -> tuple[int, int]:
        """Hidden sizes of both; 0 for a teacher that is not there."""
        return self.student.hidden_size, self.teacher.hidden_size if self.teacher else 0

    def projectors(self) -> list[Parameter]:
        """The parameters of DSKD's maps between the spaces, whole on every rank of the last stage."""
        if self.name != "dskd":
            return []
        s, t = self.widths
        sizes = {"query": (2 * t, 2 * s), "s2t": (t, s), "t2s": (s, t)}
        return [
            Parameter(f"{PROJECTORS}.{name}.{part}", numel, replicated=True)
            for name, (rows, columns) in sizes.items()
            for part, numel in (("weight", rows * columns), ("bias", rows))
        ]


def _tokens(use: Use, student: FloatArray, teacher: FloatArray) -> FloatArray:
    """Those that a use is of, from the response tokens of both sides."""
    if use.side == "paired":
        return np.minimum(student, teacher)
    return student if use.side == "student" else teacher


def _projections(loss: DistillationLoss, student: FloatArray, teacher: FloatArray) -> FloatArray:
    """Operations of DSKD's projectors, both passes: embeddings and the teacher's states need no gradient."""
    if loss.name != "dskd":
        return np.zeros_like(student)
    s, t = loss.widths
    return 2.0 * (2 * (2 * s) * (2 * t) * student + 3 * s * t * student + 2 * t * s * teacher)


def loss_flops(
    loss: DistillationLoss, parallel: ParallelConfig, student: float, teacher: float, hardware: bool = False
) -> float:
    """Operations over all ranks of a replica, both passes.

    Args:
        loss: The loss.
        parallel: The layout.
        student: Response tokens of the student's side.
        teacher: Of the teacher's.
        hardware: Count those that run; else those that the mathematics needs.
    """
    n, m = np.array(student, float), np.array(teacher, float)
    total = float(_projections(loss, n, m)) * (parallel.tensor if hardware else 1)
    for use in loss.uses:
        a = loss.model(use)
        rows = padded_vocab_size(a.vocab_size, parallel.tensor) if hardware else a.vocab_size
        products = use.products + (use.again if hardware else 0)
        total += 2.0 * rows * a.hidden_size * products * float(_tokens(use, n, m))
    return total * (parallel.context if hardware else 1)


def loss_seconds(
    loss: DistillationLoss,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    student: Load,
    teacher: Load | None,
) -> HeadSeconds:
    """Time on the last stage, both passes; the teacher's logits are made there, too."""
    n = student.targets
    m = teacher.targets if teacher is not None else np.zeros_like(n)
    rate = head_rate(numerics, hardware)
    products, again, moved, sent = _projections(loss, n, m) / rate, *(np.zeros_like(n) for _ in range(3))
    for use in loss.uses:
        a, tokens = loss.model(use), _tokens(use, n, m)
        rows = vocabulary_rows(a, parallel)
        once = 2.0 * rows * a.hidden_size * tokens / rate
        products, again = products + use.products * once, again + use.again * once
        moved = moved + use.logit_bytes * (a.vocab_size if use.whole else rows) * tokens
        if use.weight_gradient:
            chunks = np.ceil(tokens / _chunk(loss, use, parallel, "cuda"))
            moved = moved + chunks * rows * a.hidden_size * CHUNK_GRADIENT_BYTES
        if use.whole and parallel.tensor > 1:
            sent = sent + 4.0 * rows * (parallel.tensor - 1) * tokens / hardware.link_rate(1, parallel.tensor)
    return HeadSeconds(products, again, moved / hardware.memory_rate, sent)


def _chunk(loss: DistillationLoss, use: Use, parallel: ParallelConfig, device: str) -> int:
    """Tokens whose logits exist at a time, at most."""
    a = loss.model(use)
    if use.whole:
        return max(1, CHUNK_LOGITS[device] // (whole_logits.COPIES * a.vocab_size))
    return chunk_tokens(vocabulary_rows(a, parallel), device)


def loss_bytes(
    loss: DistillationLoss, parallel: ParallelConfig, numerics: Numerics, shape: Shape, device: str
) -> HeadBytes:
    """What the loss of a microbatch keeps and uses of memory, where both sides have the same response tokens."""
    tokens, element = shape.targets, numerics.element_bytes
    whole = replace(parallel, context=1)
    if loss.top_k is not None:
        found = head_bytes(loss.student, whole, numerics, shape, device)
        # Values and words of the largest; and gradients of both, with the label's, in the backward pass.
        kept = tokens * loss.top_k * (4 + 8)
        return HeadBytes(found.saved + kept, found.forward_work + kept, found.work + 2 * kept)
    s, t = loss.widths
    saved, work = element * tokens * s, 0.0
    for use in loss.uses:
        a = loss.model(use)
        rows = vocabulary_rows(a, whole)
        if use.products > 1:
            saved += element * tokens * a.hidden_size
        if use.weight_gradient:
            saved += 4 * rows * a.hidden_size
        copied = 4 * rows * a.hidden_size if device == "cpu" and element < 4 else 0
        chunk = min(tokens, _chunk(loss, use, whole, device))
        work = max(work, 4 * use.buffers * chunk * a.vocab_size + copied)
    if loss.name == "dskd":
        # Inputs and outputs of projectors and attention.
        saved += tokens * (element * (3 * s + 2 * t) + 4 * (s + 5 * t))
    # Behind the last chunk the gradient of the weight is cast to the weight's format.
    cast = element * vocabulary_rows(loss.student, whole) * s if element < 4 else 0
    return HeadBytes(saved, max(work, cast), max(work, cast))


def kept_for_step(loss: DistillationLoss, numerics: Numerics, tokens: float, last: bool) -> float:
    """Bytes of states that stay for a step: the teacher's on the last stage, DSKD's embeddings on each.

    Args:
        loss: The loss.
        numerics: Number formats.
        tokens: Response tokens that a rank has in a step, alike on both sides.
        last: Whether the stage is the last.
    """
    s, t = loss.widths
    embeddings = 2 * (s + t) if loss.name == "dskd" else 0
    return numerics.element_bytes * tokens * (embeddings + (t if last else 0))


def loss_traffic(
    loss: DistillationLoss,
    parallel: ParallelConfig,
    numerics: Numerics,
    student: Sequence[Shape],
    teacher: Sequence[Shape],
) -> list[Traffic]:
    """What a rank of the last stage sends for the loss in a step, beyond gradients of hidden states.

    Args:
        loss: The loss.
        parallel: The layout.
        numerics: Number formats.
        student: The microbatches of the rank.
        teacher: The teacher's, of the same pairs; none where a cache is read.
    """
    n, m = (np.array(float(sum(shape.targets for shape in side))) for side in (student, teacher))
    s, t = loss.widths
    found: list[Traffic] = []
    if parallel.tensor > 1:
        for use in loss.uses:
            rows = padded_vocab_size(loss.model(use).vocab_size, parallel.tensor)
            tokens = float(_tokens(use, n, m))
            if use.whole:
                chunks = -(-tokens // _chunk(loss, use, parallel, "cuda"))
                found.append(Traffic("tensor", "all-gather", 4 * rows * tokens, chunks))
            else:
                # The maximum, then the sum and the label's logit; each rank's largest and their words.
                found.append(Traffic("tensor", "all-reduce", 3 * 4 * tokens, 2 * len(student)))
                columns = parallel.tensor * (loss.top_k or 0)
                found.append(Traffic("tensor", "all-gather", (4 + 8) * columns * tokens, 2 * len(student)))
        if loss.name == "dskd":
            exchanged = numerics.element_bytes * float(n * s + m * t)
            found.append(Traffic("tensor", "all-reduce", exchanged, 2 * len(student)))
    if parallel.context > 1:
        own, other = (sum(shape.tokens for shape in side) for side in (student, teacher))
        gathered = numerics.element_bytes * (own * s + other * t)
        found.append(Traffic("context", "all-gather", gathered, len(student) + len(teacher)))
        found.append(Traffic("context", "reduce-scatter", numerics.element_bytes * own * s, len(student)))
    return found
