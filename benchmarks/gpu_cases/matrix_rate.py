"""What the device's matrix units give at best: the measure that the model's rate is held against."""

import time
from typing import Any

import torch

# Rows, columns and depth of the products: squares, and the feed-forward of an 8B model at 8,192 tokens.
CUDA_SIZES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (8192, 28672, 4096), (8192, 4096, 14336))
CPU_SIZES = ((512, 512, 512), (1024, 1024, 1024))


def matrix_rate(device: torch.device, seconds: float = 0.5) -> dict[str, Any]:
    """The highest rate of a bf16 product with fp32 accumulation, over a sweep of sizes.

    Args:
        device: The GPU, or the CPU.
        seconds: How long to repeat each size, after a fifth of it as warm-up.

    Returns:
        ``flops_per_second`` of the best size, and ``sizes``, the rate of each.
    """
    rates = {}
    for rows, columns, depth in CUDA_SIZES if device.type == "cuda" else CPU_SIZES:
        left = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
        right = torch.randn(depth, columns, device=device, dtype=torch.bfloat16)
        _repeat(left, right, seconds / 5)
        calls, elapsed = _repeat(left, right, seconds)
        rates[f"{rows}x{columns}x{depth}"] = 2.0 * rows * columns * depth * calls / elapsed
    return {"flops_per_second": max(rates.values()), "sizes": rates}


def _repeat(left: torch.Tensor, right: torch.Tensor, seconds: float) -> tuple[int, float]:
    """Multiply for some time, a handful of products between two looks at the clock; calls, and seconds they took."""
    out = left @ right
    calls, handful = 0, 10 if left.is_cuda else 1
    _finish(left)
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(handful):
            torch.mm(left, right, out=out)
        _finish(left)
        calls += handful
    return calls, elapsed


def _finish(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
