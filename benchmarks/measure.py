"""How every benchmark measures: sides in turns, ratios with their spread, peak memory in a fresh process.

Times. A machine that others use is slow for a while and fast for a while. So the sides take turns (A B A B ...), a
ratio is taken between turns that follow each other, and what is reported is the median of these ratios with their
quartiles.

Memory. On the CPU it is the kernel's own high-water mark of the resident set (``VmHWM``), set back when the measurement
begins: exact, where sampling would miss a short peak. What an earlier side left in the allocator would still be there,
so each side runs once, in a process of its own. On a GPU it is what torch's allocator counts.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements; ``count`` of them."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def text(self, digits: int = 3) -> str:
        """``median (low to high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of measurements taken in turns: turn by turn, so that a slow minute is in both."""
    return Spread.of([above / below for above, below in zip(numerator, denominator, strict=True)])


def seconds_in_turns(
    sides: Mapping[str, Callable[[], object]], turns: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call of each side, in turns: a list of ``turns`` values a side.

    Args:
        sides: What to time, by name.
        turns: Calls of each that count.
        warmup: Calls of each before those, which do not.
        device: With "cuda", a call has ended when the GPU has.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + turns):
        for name, side in sides.items():
            _synchronize(device)
            started = time.perf_counter()
            side()
            _synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """The value of a function of a module, called in a new process; what it raises is raised here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class PeakMemory:
    """The most memory that was in use at once between ``start`` and ``stop``, or while a ``with`` block ran.

    Attributes:
        before: Bytes in use when it began.
        peak: Bytes in use at the most; set by ``stop``.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Args:
        device: "cpu" for the resident set of this process (Linux), "cuda" for torch's allocations on the GPU.
        """
        self._on_gpu = torch.device(device).type == "cuda"
        self.before = self.peak = 0

    @property
    def beyond(self) -> int:
        """Bytes at the peak that were not there before."""
        return max(0, self.peak - self.before)

    def start(self) -> None:
        """Set the mark back to what is in use now."""
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident_bytes("VmRSS")

    def stop(self) -> None:
        """Read the mark; it can be read again later."""
        if self._on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = resident_bytes("VmHWM")

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def resident_bytes(field: str) -> int:
    """``VmRSS``, the resident set of this process now, or ``VmHWM``, the largest since it was last set back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise KeyError(field)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
