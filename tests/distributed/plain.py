"""The same methods in plain ``transformers`` and PyTorch: one sequence at a time, whole logits, no padding, fp64.

Shares no code with the package: prompts come from ``apply_chat_template``, spans from counting characters (pairs are
ASCII), the loss from its formula, the update from ``torch.optim.AdamW``.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Optim:
    """What the runs are trained with: AdamW, cosine without warm-up."""

    lr: float = 1e-3
    eps: float = 1e-3
    weight_decay: float = 0.1
    clip_grad: float = 0.5


@dataclass
class Trained:
    """Of each step the metrics and gradients; the weights after the last."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """A prompt, a response with its end of turn, and how far into the response's text each of its tokens reaches."""

    prompt: list[int]
    response: list[int]
    ends: list[int]


def read_rows(pairs: Path) -> list[dict[str, Any]]:
    """The pairs of a file."""
    return [json.loads(line) for line in pairs.read_text().splitlines()]


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def _model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def tokens(folder: Path, row: dict[str, Any], name: str) -> Tokens:
    """One side's tokens of a response. The end of turn, one past the text, reaches one character further."""
    tokenizer = _tokenizer(folder)
    text = row[name][0]["content"]
    assert text.isascii()
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [piece.replace("Ġ", " ").replace("▁", " ") for piece in tokenizer.convert_ids_to_tokens(ids)]
    joined = "".join(pieces)
    assert joined.removeprefix(" ") == text
    # SentencePiece puts a space in front that the text does not have.
    ends = [max(0, end - (len(joined) - len(text))) for end in accumulate(map(len, pieces))]
    return Tokens(prompt, [*ids, tokenizer.eos_token_id], [*ends, len(text) + 1])


def logprobs(model: PreTrainedModel, sequence: Tokens) -> Tensor:
    """Log-prob of each response token, ``[n_response]``."""
    ids = torch.tensor([sequence.prompt + sequence.response])
    every = torch.log_softmax(model(ids).logits[0], dim=-1)
    first = len(sequence.prompt)
    return every[first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1)


def span_sums(values: Tensor, ends: list[int], bounds: list[int]) -> Tensor:
    """The sum of the tokens that end in each span, ``[n_spans]``; ``bounds`` are the ends of the spans."""
    span = [next(number for number, bound in enumerate(bounds) if end <= bound) for end in ends]
    return torch.stack([values[[at == number for at in span]].sum() for number in range(len(bounds))])


def shared_ends(first: Tokens, second: Tokens) -> list[int]:
    """Where a token ends on both sides; a token that reaches no character ends nothing."""
    return sorted((set(first.ends) & set(second.ends)) - {0})


def span_scores(
    scored: Path, other: Path, reader: Path, row: dict[str, Any], name: str, of: Callable[..., Tensor] = logprobs
) -> Tensor:
    """Sums over spans shared with ``other`` of what ``of`` finds of the model ``scored``, which reads as ``reader``."""
    sides = tokens(other, row, name), tokens(reader, row, name)
    with torch.no_grad():
        return span_sums(of(cached_model(scored), sides[1]), sides[1].ends, shared_ends(*sides))


@cache
def cached_model(folder: Path) -> PreTrainedModel:
    return _model(folder)


@dataclass(frozen=True)
class Method:
    """SFT where ``reference`` is None; DPO or TIS-DPO where it is the policy's own folder; else CTPD.

    Attributes:
        policy: Folder of the model that is trained.
        reference: Folder of the model it is measured against.
        weights: From a row and the name of a response to the weight of each span; None for weights of 1.
        at_policy: Whether the reference is what the policy was, on the spans shared with ``reference``.
        beta: Strength of the pull to the reference.
        reverse: Prefer the rejected response.
    """

    policy: Path
    reference: Path | None = None
    weights: Callable[[dict[str, Any], str], Tensor] | None = None
    at_policy: bool = False
    beta: float = 0.1
    reverse: bool = False

    def loss(self, model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, float]]:
        """The loss of a global batch, and the metrics that training reports."""
        if self.reference is None:
            loss = -torch.cat([logprobs(model, tokens(self.policy, row, "chosen")) for row in rows]).mean()
            return loss, {"loss": loss.item()}
        sides = [[self._reward(model, row, name) for name in ("chosen", "rejected")] for row in rows]
        rewards, sums = (torch.stack([torch.stack([side[i] for side in pair]) for pair in sides]) for i in (0, 1))
        if self.reverse:
            rewards, sums = rewards.flip(1), sums.flip(1)
        margin = rewards[:, 0] - rewards[:, 1]
        loss = torch.log1p(torch.exp(-margin)).mean()
        metrics = {"loss": loss, "margin": margin.mean(), "accuracy": (margin > 0).double().mean()}
        for i, name in enumerate(("chosen", "rejected")):
            metrics |= {f"reward_{name}": rewards[:, i].mean(), f"logprob_{name}": sums[:, i].mean()}
        return loss, {name: float(value) for name, value in metrics.items()}

    def _reward(self, model: PreTrainedModel, row: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
        """``beta * sum_s w_s (log pi(s) - log pi_ref(s))`` of a response, and its log-prob."""
        assert self.reference is not None
        own, other = tokens(self.policy, row, name), tokens(self.reference, row, name)
        policy = span_sums(logprobs(model, own), own.ends, shared_ends(own, other))
        weights = torch.ones_like(policy) if self.weights is None else self.weights(row, name)
        sides = (self.reference, self.policy) if self.at_policy else (self.policy, self.reference)
        reference = span_scores(sides[1], *sides, row, name)
        return self.beta * (weights * (policy - reference)).sum(), policy.detach().sum()


def train(method: Any, pairs: Path, global_batch: int, optim: Optim, total_steps: int) -> Trained:
    """Train on the pairs in file order, over and over; ``method`` has a ``policy``, a ``loss``, and maybe ``extra``."""
    rows = read_rows(pairs)
    batches = [rows[start : start + global_batch] for start in range(0, len(rows), global_batch)]
    model, trained = _model(method.policy), Trained()
    named, extra = dict(model.named_parameters()), getattr(method, "extra", {})
    groups = [
        {"params": [p for p in those.values() if (p.ndim > 1) == matrix], "weight_decay": decay, "peak": peak}
        for those, peak in ((named, optim.lr), (extra, getattr(method, "extra_lr", 0.0)))
        for matrix, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    named = named | extra
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, eps=optim.eps)
    for step in range(total_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        optimizer.zero_grad()
        loss, metrics = method.loss(model, batches[step % len(batches)])
        loss.backward()
        trained.gradients.append({name: parameter.grad.clone() for name, parameter in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(named.values(), optim.clip_grad)
        trained.metrics.append({**metrics, "grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]})
        optimizer.step()
    trained.weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return trained
