"""Lean token log-probs beside full logits and ``log_softmax``: time and memory of forward and backward.

    python benchmarks/logprobs.py                 # vocabulary 128,256, 4,096 tokens, hidden 128 and 512, fp32, CPU
    python benchmarks/logprobs.py --device cuda --dtype bf16 --hidden 4096

Both sides run in one process, in turns; times are medians over the turns. Memory is the peak of allocations beyond what
was there before, weights and their gradients excluded: on the CPU as the process' resident set, sampled while each side
runs once alone in a fresh process; on a GPU as the allocator counts it. Writes a Markdown table to standard output and
the figures to ``--json``.
"""

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from ctpd_nemo.losses.logprobs import token_logprobs

Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """The full logits, their ``log_softmax``, and the labels' entries."""
    logits_NV = (hidden_NH @ weight_VH.t()).float()
    return logits_NV.log_softmax(-1).gather(1, labels_N[:, None]).squeeze(1)


def lean(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """What this project does."""
    return token_logprobs(hidden_NH, weight_VH, labels_N, len(weight_VH))


SIDES: dict[str, Side] = {"plain": plain, "lean": lean}


def inputs(args: argparse.Namespace, hidden: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels, and the gradient that arrives from the loss."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    hidden_NH = torch.randn(args.tokens, hidden, generator=generator).to(args.device, dtype).requires_grad_()
    weight_VH = (torch.randn(args.vocab, hidden, generator=generator) / hidden**0.5).to(args.device, dtype)
    labels_N = torch.randint(args.vocab, (args.tokens,), generator=generator).to(args.device)
    grad_N = torch.randn(args.tokens, generator=generator).to(args.device)
    return hidden_NH, weight_VH.requires_grad_(), labels_N, grad_N


def step(side: Side, batch: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward once; gradients stay where they are, so that they are allocated only once."""
    hidden_NH, weight_VH, labels_N, grad_N = batch
    side(hidden_NH, weight_VH, labels_N).backward(grad_N)
    if hidden_NH.is_cuda:
        torch.cuda.synchronize()


def seconds(args: argparse.Namespace, hidden: int) -> dict[str, list[float]]:
    """Times of each side, in turns."""
    batch = inputs(args, hidden)
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(args.turns + 1):
        for name, side in SIDES.items():
            started = time.perf_counter()
            step(side, batch)
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return times


def _peak_of(name: str, args: argparse.Namespace, hidden: int, result: Any) -> None:
    """Peak of memory beyond the inputs and the gradient of the weight, of one step in this process."""
    torch.set_num_threads(args.threads)
    batch = inputs(args, hidden)
    for tensor in batch[:2]:
        tensor.grad = torch.zeros_like(tensor)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(SIDES[name], batch)
        result.put(torch.cuda.max_memory_allocated() - before)
        return
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    step(SIDES[name], batch)
    done.set()
    watcher.join()
    result.put(max(0, peak[0] - before))


def peak_bytes(name: str, args: argparse.Namespace, hidden: int) -> int:
    """Peak memory of a side, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_peak_of, args=(name, args, hidden, result))
    process.start()
    peak = result.get()
    process.join()
    return peak


def gradient_error(args: argparse.Namespace, hidden: int) -> float:
    """Largest relative difference, in norm, between the two sides' values and gradients."""
    found = {}
    for name, side in SIDES.items():
        hidden_NH, weight_VH, labels_N, grad_N = inputs(args, hidden)
        values_N = side(hidden_NH, weight_VH, labels_N)
        values_N.backward(grad_N)
        found[name] = (values_N.detach(), hidden_NH.grad, weight_VH.grad)
    pairs = zip(found["plain"], found["lean"], strict=True)
    return max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default="logprobs.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for hidden in args.hidden:
        medians = {name: statistics.median(times) for name, times in seconds(args, hidden).items()}
        peaks = {name: peak_bytes(name, args, hidden) for name in SIDES}
        rows.append(
            {
                "hidden": hidden,
                "seconds": medians,
                "time_ratio": medians["lean"] / medians["plain"],
                "peak_bytes": peaks,
                "memory_ratio": peaks["lean"] / peaks["plain"],
                "gradient_error": gradient_error(args, hidden),
            }
        )
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file, indent=2)
    print(f"vocabulary {args.vocab:,}, {args.tokens:,} tokens, {args.dtype}, {args.device}, {args.threads} threads\n")
    print("| hidden | plain s | lean s | time lean/plain | plain MiB | lean MiB | memory lean/plain | gradient error |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        seconds_of = row["seconds"]
        mib = {name: value / 2**20 for name, value in row["peak_bytes"].items()}
        print(
            f"| {row['hidden']} | {seconds_of['plain']:.2f} | {seconds_of['lean']:.2f} | {row['time_ratio']:.2f} "
            f"| {mib['plain']:,.0f} | {mib['lean']:,.0f} | {row['memory_ratio']:.3f} | {row['gradient_error']:.1e} |"
        )


if __name__ == "__main__":
    main()
