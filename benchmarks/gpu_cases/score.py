"""A frozen teacher over packed pairs, forward only, by the package's own model, with drawn weights."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from measure import PeakMemory

from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.teacher import FrozenModel
from ctpd_nemo.parallel.layout import initialize, local_device
from ctpd_nemo.pipeline import quiet
from gpu_cases.matrix_rate import matrix_rate
from gpu_cases.setting import Case, Setting
from gpu_cases.shapes import STUDENTS, TEACHERS, parameters
from gpu_cases.train import flops_of
from gpu_cases.weights import drawn_weights
from gpu_cases.world import run_config


def score_case(setting: Setting, case: Case, folder: Path) -> dict[str, Any]:
    """Score ``setting.steps`` batches; what ``train_case`` returns, where a step is a batch."""
    quiet.after_imports()
    student, teacher = (STUDENTS["toy"], 0), (TEACHERS[case.shape], case.layers)
    run = run_config(setting, folder, student, teacher, case.precision, setting.scoring_tokens)
    run.check(world_size=1)
    initialize(run.parallel, run.seed)
    device = local_device()
    rate = matrix_rate(device)
    data = RunData(run, ("chosen", "rejected"), two_sided=True, online=True)
    if run.precision.fp8 is not None:
        run.precision = dataclasses.replace(run.precision, fp8_frozen_weights=True)
    with drawn_weights():
        model = FrozenModel(str(folder / "teacher"), run.parallel, run.precision)
    memory = PeakMemory(device.type)
    steps = []
    for number, batch in enumerate(data.train_loader(0, 1, 0)):
        microbatches = [part.to(device) for part in batch.reference_microbatches]
        if number == setting.warmup:
            memory.start()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        scores = [part.cpu() for part in model.score(microbatches)]
        if number >= setting.warmup:
            steps.append(
                {
                    "seconds": time.perf_counter() - started,
                    "mean_score": float(torch.cat(scores).mean()),
                    "microbatches": len(microbatches),
                    "tokens": sum(part.num_tokens for part in microbatches),
                    "response_tokens": sum(int((part.labels >= 0).sum()) for part in microbatches),
                    "flops": flops_of(model.architecture, microbatches),
                }
            )
    memory.stop()
    return {
        "matrix_rate": rate,
        "parameters": parameters(model.architecture),
        "steps": steps,
        "peak_bytes": memory.peak,
        "profile": None,
    }
