"""The distillation baselines in plain ``transformers`` and PyTorch: whole logits, one response at a time, fp64."""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.distributed.plain import tokens
from tests.distributed.world import TOLERANCE


@dataclass(frozen=True)
class Side:
    """One model at the positions that predict a response token: hidden states and logits, and the tokens there."""

    hidden: Tensor
    logits: Tensor
    inputs: Tensor
    labels: Tensor
    embedding: Tensor
    head: Tensor

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)


def read(model: PreTrainedModel, folder: Path, row: dict[str, Any]) -> Side:
    """The chosen response of a row under a model."""
    sequence = tokens(folder, row, "chosen")
    ids, first = torch.tensor(sequence.prompt + sequence.response), len(sequence.prompt)
    output = model(ids[None], output_hidden_states=True)
    return Side(
        output.hidden_states[-1][0, first - 1 : -1],
        output.logits[0, first - 1 : -1],
        ids[first - 1 : -1],
        ids[first:],
        model.get_input_embeddings().weight.detach(),
        model.get_output_embeddings().weight,
    )


@cache
def _teacher(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


@dataclass(frozen=True)
class Distillation:
    """A method, as ``plain.train`` takes it.

    Attributes:
        policy: Folder of the student.
        teacher: Folder of the teacher.
        kind: "uld", "multilevel_ot" or "dskd".
        options: Values of its config.
        extra: What is trained beside the student, by name; of ``options["projector_lr"]``.
        flipped: Whether a probability that is all but equal to the other pulls the other way, as rounding may have it.
    """

    policy: Path
    teacher: Path
    kind: str
    options: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)
    flipped: bool = False

    @property
    def extra_lr(self) -> float:
        return self.options.get("projector_lr", 0.0)

    def loss(self, model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, float]]:
        """The loss of a global batch, and the metrics that training reports."""
        total, entropy, distillation, count = 0.0, 0.0, 0.0, 0
        for row in rows:
            student = read(model, self.policy, row)
            with torch.no_grad():
                teacher = read(_teacher(self.teacher), self.teacher, row)
            label = -student.logits.log_softmax(-1).gather(1, student.labels[:, None]).sum()
            if self.kind == "dskd":
                pull, rate = dskd(student, teacher, self.extra, self.options["temperature"]), self.options["rate"]
                total = total + (1 - rate) * label + rate * pull
            else:
                transport = {"uld": uld, "multilevel_ot": multilevel_ot}[self.kind]
                pull = transport(student, teacher, self.options, self.flipped)
                total = total + label + self.options["weight"] * pull
            entropy, distillation = entropy + label.item(), distillation + pull.item()
            count += len(student.labels)
        loss = total / count
        metrics = {"loss": loss.item(), "cross_entropy": entropy / count, "distillation": distillation / count}
        return loss, metrics


def difference(p: Tensor, q: Tensor, flipped: bool) -> Tensor:
    """``|p - q|`` of probabilities; ``flipped``: with the other sign where rounding may decide which is larger."""
    found = (p - q).abs()
    return torch.where(flipped & (found < TOLERANCE * (p + q)), -found, found)


def uld(student: Side, teacher: Side, options: dict[str, Any], flipped: bool) -> Tensor:
    """Token by token, until the shorter tokenization ends."""
    total = torch.tensor(0.0, dtype=torch.double)
    for p, q in zip(student.probs, teacher.probs, strict=False):
        p, q = p.sort(descending=True)[0], q.sort(descending=True)[0]
        if options.get("top_k"):
            k = options["top_k"]
            p, q = (torch.cat([x[:k], x[k:].sum()[None]]) for x in (p, q))
        size = max(len(p), len(q))
        p, q = (torch.cat([x, torch.zeros(size - len(x))]) for x in (p, q))
        total = total + difference(p, q, flipped).sum()
    return total


def multilevel_ot(student: Side, teacher: Side, options: dict[str, Any], flipped: bool) -> Tensor:
    """Absolute differences and logarithmic costs of equal places, and Sinkhorn over the response."""
    p, q = (side.probs.sort(descending=True)[0][:, : options["top_k"]] for side in (student, teacher))
    n = min(len(p), len(q))
    total = difference(p[:n], q[:n], flipped).sum() - options["logarithmic_weight"] * (q[:n] * p[:n].log()).sum()
    cost = difference(p[:, None], q[None], flipped).sum(-1)
    plan = torch.exp(-cost / options["epsilon"])
    for _ in range(options["iterations"]):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True) * len(p) / len(q)
    return total + options["sequence_weight"] * (plan * cost).sum()


def dskd(student: Side, teacher: Side, projectors: dict[str, Tensor], temperature: float) -> Tensor:
    """The three terms of cross-model attention."""

    def project(name: str, values: Tensor) -> Tensor:
        return values @ projectors[f"projectors.{name}.weight"].T + projectors[f"projectors.{name}.bias"]

    def kl(target: Tensor, logits: Tensor) -> Tensor:
        target, logits = target / temperature, logits / temperature
        return (target.softmax(-1) * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)

    s_in, s_out = student.embedding[student.inputs], student.embedding[student.labels]
    t_in, t_out = teacher.embedding[teacher.inputs], teacher.embedding[teacher.labels]
    key = torch.cat([t_in, t_out], -1)
    scores = project("query", torch.cat([s_in, s_out], -1)) @ (key / key.std()).T
    scores = scores / math.sqrt(2 * teacher.hidden.shape[1])
    value = project("t2s", teacher.hidden / teacher.hidden.std() + t_out / t_out.std())
    t2s = scores.softmax(1) @ value @ student.head.detach().T
    s2t = scores.T.softmax(1) @ project("s2t", student.hidden) @ teacher.head.T
    right = t2s.argmax(-1) == student.labels
    entropy = -t2s.log_softmax(-1).gather(1, student.labels[:, None]).sum()
    return entropy + (kl(t2s.detach(), student.logits) * right).sum() + kl(teacher.logits, s2t).sum()


def draw_projectors(student: int, teacher: int, seed: int) -> dict[str, Tensor]:
    """What projectors begin with: uniform within one over the root of the inputs, in this order from one generator."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, size, out in (
        ("query", 2 * student, 2 * teacher),
        ("s2t", student, teacher),
        ("t2s", teacher, student),
    ):
        for kind, shape in (("weight", (out, size)), ("bias", (out,))):
            uniform = torch.empty(shape).uniform_(-(size**-0.5), size**-0.5, generator=generator)
            drawn[f"projectors.{name}.{kind}"] = uniform.double().requires_grad_()
    return drawn
