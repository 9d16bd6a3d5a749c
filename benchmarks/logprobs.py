"""Lean token log-probs beside full logits and ``log_softmax``: time and memory of forward and backward.

    python benchmarks/logprobs.py                 # vocabulary 128,256, 4,096 tokens, hidden 128 and 512, fp32, CPU
    python benchmarks/logprobs.py --device cuda --dtype bf16 --hidden 2048 4096

Memory is what is needed at the most beyond hidden states, weight and their gradients. The error is the largest relative
difference, in norm, between values and gradients of the two sides. Other heads than these two, Liger's and
Megatron-Core's, stand beside them in ``gpu_step.py``.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import PeakMemory, Spread, in_fresh_process, ratio, seconds_in_turns
from report import Table, add_report_arguments, begin, write_report
from torch import Tensor

from ctpd_nemo.losses.logprobs import token_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The full logits, their ``log_softmax``, and the labels' entries."""
    return (hidden_NH @ weight_VH.t()).float().log_softmax(-1).gather(1, labels_N[:, None]).squeeze(1)


def lean(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """What this project does."""
    return token_logprobs(hidden_NH, weight_VH, labels_N, len(weight_VH))


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "lean": lean}


def inputs(args: argparse.Namespace, hidden: int) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels, and the gradient that arrives from the loss."""
    draw = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(args.tokens, hidden, generator=draw).to(args.device, DTYPES[args.dtype])
    weight_VH = torch.randn(args.vocab, hidden, generator=draw).div_(hidden**0.5).to(args.device, DTYPES[args.dtype])
    labels_N = torch.randint(args.vocab, (args.tokens,), generator=draw).to(args.device)
    grad_N = torch.randn(args.tokens, generator=draw).to(args.device)
    return hidden_NH.requires_grad_(), weight_VH.requires_grad_(), labels_N, grad_N


def step(name: str, batch: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward once; the gradients are fresh."""
    hidden_NH, weight_VH, labels_N, grad_N = batch
    hidden_NH.grad = weight_VH.grad = None
    values_N = SIDES[name](hidden_NH, weight_VH, labels_N)
    values_N.backward(grad_N)
    return values_N.detach()


def peak_bytes(name: str, args: argparse.Namespace, hidden: int) -> int:
    """Peak memory of one step beyond inputs and gradients; to be called in a fresh process."""
    begin(args)
    batch = inputs(args, hidden)
    # What libraries set up at their first product is not the side's.
    hidden_NH, weight_VH, labels_N, grad_N = batch
    step(name, (hidden_NH.detach()[:8].requires_grad_(), weight_VH, labels_N[:8], grad_N[:8]))
    weight_VH.grad = None
    with PeakMemory(args.device) as memory:
        step(name, batch)
    return memory.beyond - sum(tensor.numel() * tensor.element_size() for tensor in batch[:2])


def error(args: argparse.Namespace, hidden: int) -> float:
    """How far the two sides are apart."""
    batch = inputs(args, hidden)
    found = {name: (step(name, batch), batch[0].grad, batch[1].grad) for name in SIDES}
    pairs = zip(found["lean"], found["plain"], strict=True)
    return max(float((own - other).float().norm() / other.float().norm()) for own, other in pairs)


def measure(args: argparse.Namespace, hidden: int) -> dict[str, Any]:
    """Everything at one width."""
    batch = inputs(args, hidden)
    seconds = seconds_in_turns(
        {name: lambda name=name: step(name, batch) for name in SIDES}, args.turns, device=args.device
    )
    peaks = {name: in_fresh_process(peak_bytes, name, args, hidden) for name in SIDES}
    return {
        "hidden": hidden,
        "seconds": seconds,
        "time_ratio": ratio(seconds["lean"], seconds["plain"]),
        "peak_bytes": peaks,
        "memory_ratio": peaks["lean"] / peaks["plain"],
        "error": error(args, hidden),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    add_report_arguments(parser)
    args = parser.parse_args()
    begin(args)
    results = [measure(args, hidden) for hidden in args.hidden]
    rows = [
        [
            str(row["hidden"]),
            *(Spread.of(row["seconds"][name]).text(2) for name in SIDES),
            row["time_ratio"].text(2),
            *(f"{row['peak_bytes'][name] / 2**20:,.0f}" for name in SIDES),
            f"{row['memory_ratio']:.3f}",
            f"{row['error']:.1e}",
        ]
        for row in results
    ]
    header = ["hidden", "plain s", "lean s", "time ratio", "plain MiB", "lean MiB", "memory ratio", "error"]
    caption = f"Vocabulary {args.vocab:,}, {args.tokens:,} tokens, {args.dtype}, {args.device}; medians and quartiles."
    write_report("Token log-probs: lean beside plain", [Table(caption, header, rows)], results, args)


if __name__ == "__main__":
    main()
