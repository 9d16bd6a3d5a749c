"""Steps of CTPD from a score cache, by the package's own model, loop and optimizer, with drawn weights."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from measure import PeakMemory
from torch.profiler import ProfilerActivity, profile

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.ctpd import CTPD
from ctpd_nemo.models.data import RunData
from ctpd_nemo.parallel.layout import initialize, local_device
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.trainer import build_trainer
from gpu_cases.matrix_rate import matrix_rate
from gpu_cases.setting import Case, Setting
from gpu_cases.shapes import STUDENTS, TEACHERS, forward_flops, parameters
from gpu_cases.weights import drawn_weights
from gpu_cases.world import InventedScores, run_config


def train_case(setting: Setting, case: Case, folder: Path) -> dict[str, Any]:
    """Train ``setting.steps`` steps.

    Returns:
        ``matrix_rate``, ``parameters``, ``steps`` (one dictionary a step that counts), ``peak_bytes``, and ``profile``,
        a table, where it was asked for.
    """
    quiet.after_imports()
    student, teacher = (STUDENTS[case.shape], case.layers), (TEACHERS["toy"], 0)
    run = run_config(setting, folder, student, teacher, case.precision, setting.microbatch_tokens)
    run.check(world_size=1)
    initialize(run.parallel, run.seed)
    rate = matrix_rate(local_device())
    data = RunData(run, ("chosen", "rejected"), two_sided=True)
    data.scores = InventedScores(data)
    clock = StepClock(setting)
    trainer = build_trainer(run, data.total_steps, [clock])
    with drawn_weights():
        model = CTPD(run, data, trainer)
        trainer.fit(model)
    for step in clock.steps:
        step["flops"] = 3.0 * step.pop("forward_flops")
    return {
        "matrix_rate": rate,
        "parameters": parameters(model.architecture),
        "steps": clock.steps,
        "peak_bytes": clock.memory.peak,
        "profile": clock.table,
    }


class StepClock(Callback):
    """Times whole steps, the loop and the wait for data included, and reads the memory they took."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.memory = PeakMemory(local_device().type)
        self.steps: list[dict[str, Any]] = []
        self.table: str | None = None
        self._profiler: profile | None = None
        self._last = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Profile the step behind those that are timed."""
        if batch_idx == self.setting.steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is done, on the device too."""
        _finish()
        now = time.perf_counter()
        if self._profiler is not None:
            self._profiler.stop()
            by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            self.table = self._profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)
            return
        if batch_idx == self.setting.warmup - 1:
            self.memory.start()
        elif batch_idx >= self.setting.warmup:
            self.memory.stop()
            self.steps.append({"seconds": now - self._last, **_facts(pl_module, batch.microbatches)})
        self._last = time.perf_counter()


def _facts(model: CTPD, microbatches: list[Microbatch]) -> dict[str, Any]:
    """What a step was made of."""
    stats = model.last_stats
    return {
        "inner_seconds": model.last_metrics["step_seconds"],
        "loss": model.last_metrics["loss"],
        "microbatches": len(microbatches),
        "tokens": stats.tokens,
        "response_tokens": stats.response_tokens,
        "padding": stats.padding,
        "forward_flops": flops_of(model.architecture, microbatches),
    }


def flops_of(architecture: Architecture, microbatches: list[Microbatch]) -> float:
    """Operations of a forward pass over microbatches; the few tokens of padding at a sequence's end are counted."""
    return sum(
        forward_flops(architecture, part.cu_seqlens.diff().tolist(), int((part.labels >= 0).sum()))
        for part in microbatches
    )


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
