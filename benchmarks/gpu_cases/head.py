"""From hidden states to the DPO loss and back: this project's log-probs beside what else there is.

    lean       this project's ``token_logprobs``
    plain      all logits, ``log_softmax`` in fp32
    megatron   all logits, Megatron-Core's fused vocabulary-parallel cross-entropy
    liger      Liger's fused linear DPO loss, a pair at a time (where ``liger-kernel`` is installed)

All compute the same loss, against a reference whose log-probs are zero, and the gradients of hidden states and weight.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import PeakMemory, Spread, ratio, seconds_in_turns
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from torch import Tensor

from ctpd_nemo.losses.logprobs import token_logprobs
from ctpd_nemo.parallel.layout import ParallelConfig, initialize, local_device

BETA = 0.1


@dataclass(frozen=True)
class HeadCase:
    """Sizes: ``pairs`` of two responses of ``length`` tokens each, and calls of each side that count."""

    hidden: int
    vocab: int
    pairs: int
    length: int
    turns: int


def head_case(case: HeadCase) -> dict[str, Any]:
    """Seconds, memory beyond inputs and their gradients, loss and gradient error of each side that is there."""
    initialize(ParallelConfig())
    device = local_device()
    hidden_BTH, weight_VH, labels_BT = _inputs(case, device)
    sides: dict[str, Callable[[], Tensor]] = {
        name: lambda loss=loss: _step(loss, hidden_BTH, weight_VH, labels_BT) for name, loss in _losses(device).items()
    }
    seconds = seconds_in_turns(sides, case.turns, warmup=2, device=device.type)
    results: dict[str, Any] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, side in sides.items():
        for tensor in (hidden_BTH, weight_VH):
            tensor.grad = torch.zeros_like(tensor)
        with PeakMemory(device.type) as memory:
            loss = side()
        gradients[name] = [tensor.grad.float().cpu() for tensor in (hidden_BTH, weight_VH)]
        results[name] = {
            "seconds": Spread.of(seconds[name]),
            "seconds_over_lean": ratio(seconds[name], seconds["lean"]),
            "peak_bytes_beyond": memory.beyond,
            "loss": float(loss),
        }
    for name in results:
        pairs = zip(gradients[name], gradients["plain"], strict=True)
        results[name]["gradient_error"] = max(float((own - plain).norm() / plain.norm()) for own, plain in pairs)
    return results


def _inputs(case: HeadCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[2 pairs, length, H]``, chosen first; output weight; labels. bf16 on a GPU, fp32 elsewhere."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_BTH = torch.randn(2 * case.pairs, case.length, case.hidden, device=device).to(dtype)
    weight_VH = (torch.randn(case.vocab, case.hidden, device=device) / case.hidden**0.5).to(dtype)
    labels_BT = torch.randint(case.vocab, (2 * case.pairs, case.length), device=device)
    return hidden_BTH.requires_grad_(), weight_VH.requires_grad_(), labels_BT


def _step(loss: Callable[..., Tensor], hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    value = loss(hidden_BTH, weight_VH, labels_BT)
    value.backward()
    return value.detach()


def _losses(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The sides that are there, by name."""
    losses = {"lean": _lean, "plain": _plain, "megatron": _megatron}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        liger = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=device.type == "cuda")
        losses["liger"] = lambda hidden_BTH, weight_VH, labels_BT: liger(weight_VH, hidden_BTH, labels_BT)[0]
    return losses


def _lean(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    logprobs_N = token_logprobs(hidden_BTH.flatten(0, 1), weight_VH, labels_BT.flatten(), len(weight_VH))
    return _dpo(logprobs_N.view_as(labels_BT))


def _plain(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    logprobs_BTV = F.linear(hidden_BTH, weight_VH).float().log_softmax(-1)
    return _dpo(logprobs_BTV.gather(2, labels_BT[..., None]).squeeze(2))


def _megatron(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    return _dpo(-fused_vocab_parallel_cross_entropy(F.linear(hidden_BTH, weight_VH), labels_BT, group))


def _dpo(logprobs_BT: Tensor) -> Tensor:
    chosen, rejected = logprobs_BT.sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
