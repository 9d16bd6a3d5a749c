"""What the planner says: tables for a terminal and for Markdown, and everything as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ctpd_nemo.planner.communication import group_sizes
from ctpd_nemo.planner.estimate import Estimate
from ctpd_nemo.planner.hardware import GIB, Hardware
from ctpd_nemo.planner.jobs import Job
from ctpd_nemo.planner.memory import StageMemory
from ctpd_nemo.planner.scaling import StageStudy, reasons, verdict
from ctpd_nemo.planner.tables import Table

_KINDS = ("weights", "gradients", "optimizer", "frozen", "activations", "sent", "head", "work", "scoring", "data")
_GROUPS = ("tensor", "context", "pipeline", "data", "embedding")


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.3f}"


def describe(job: Job) -> str:
    """What a stage does, in a line."""
    frozen = ", ".join(f"{f.count} x {f.model.name}" for f in job.frozen)
    if job.model is None:
        return f"scores with {frozen}"
    beside = f", beside {frozen} frozen" if frozen else ""
    return f"{job.method} of {job.model.name}{beside}"


def models_table(jobs: Sequence[Job]) -> Table:
    """The models and their parameters."""
    models = {model.name: model for job in jobs for model in job.models}
    rows = [
        [name, f"{model.parameters / 1e9:.2f}", str(model.architecture.num_layers), model.source]
        for name, model in models.items()
    ]
    return Table("Models", [" model", "parameters (1e9)", "layers", " sizes from"], rows)


def layout_table(found: Sequence[Estimate], title: str) -> Table:
    """What the stages do, and their layouts."""
    rows = [[estimate.job.name, describe(estimate.job), str(estimate.layout)] for estimate in found]
    return Table(title, [" stage", " what it does", " layout"], rows)


def memory_table(found: Sequence[Estimate], hardware: Hardware) -> Table:
    """Memory by kind on the fullest GPU, and on the last pipeline stage where that is another."""
    rows = []
    for estimate in found:
        last = len(estimate.stages) - 1
        for stage in dict.fromkeys((estimate.fullest_stage, last)):
            rows.append([estimate.job.name, str(stage), *_memory_cells(estimate.stages[stage])])
    title = (
        f"Memory of one GPU, GiB: {hardware.usable_bytes / GIB:.1f} of the {hardware.memory_gib:g} of {hardware.name} "
        "are for tensors"
    )
    columns = [" stage", "pipeline stage", *_KINDS, "peak"]
    return Table(title, columns, rows)


def _memory_cells(memory: StageMemory) -> list[str]:
    values = [getattr(memory, kind) for kind in (*_KINDS, "peak")]
    return [f"{value / GIB:.2f}" if value else "-" for value in values]


def work_table(found: Sequence[Estimate]) -> Table:
    """Operations of a step, and what one rank of the last pipeline stage sends."""
    rows = []
    for estimate in found:
        sent = dict.fromkeys(_GROUPS, 0.0)
        sizes = group_sizes(estimate.layout.parallel, estimate.layout.replicas)
        for traffic in estimate.traffic:
            sent[traffic.group] += traffic.wire(sizes[traffic.group])
        cells = [f"{sent[group] / 1e9:.3f}" if sent[group] else "-" for group in _GROUPS]
        flops = [f"{estimate.model_flops / 1e12:,.1f}", f"{estimate.hardware_flops / 1e12:,.1f}"]
        rows.append([estimate.job.name, *flops, f"{estimate.microbatches:.1f}", *cells])
    columns = [" stage", "model TFLOP", "hardware TFLOP", "microbatches", *(f"{group} GB" for group in _GROUPS)]
    return Table("A step: operations of all GPUs; what one GPU of the last pipeline stage sends", columns, rows)


def time_table(found: Sequence[Estimate], hardware: Hardware) -> Table:
    """Time of a step, and of the stage."""
    rows = [
        [
            estimate.job.name,
            f"{estimate.step_seconds:.3f}",
            f"{estimate.tokens_per_second:,.0f}",
            f"{estimate.utilisation(hardware):.1%}",
            f"{estimate.parts.shares()['bubble']:.0%}",
            f"{estimate.steps:,}",
            _hours(estimate.hours),
            f"{estimate.gpu_hours:,.1f}",
            "; ".join(reasons(estimate)[:3]),
        ]
        for estimate in found
    ]
    hours, gpu_hours = sum(e.hours for e in found), sum(e.gpu_hours for e in found)
    rows.append(["the run", "", "", "", "", "", _hours(hours), f"{gpu_hours:,.1f}", ""])
    columns = [" stage", "s a step", "tokens/s", "MFU", "bubble", "steps", "hours", "GPU-hours", " beside operations"]
    return Table("Time (estimated)", columns, rows)


def scaling_table(studies: Sequence[StageStudy], sizes: Sequence[int], hardware: Hardware) -> Table:
    """Every stage on every number of GPUs: the best layout there, what it costs, and what limits it."""
    rows = []
    for study in studies:
        for gpus in sizes:
            best = study.found[gpus]
            if best is None:
                need = f"does not fit; {study.least.layout.gpus} do" if study.least else "does not fit"
                rows.append([study.job.name, str(gpus), need, *[""] * 5, ""])
                continue
            cells = [_hours(best.hours), f"{best.gpu_hours:,.1f}", f"{study.cheapest / best.gpu_hours:.0%}"]
            cells += [f"{best.utilisation(hardware):.1%}", f"{best.peak_bytes / GIB:.0f}"]
            rows.append([study.job.name, str(gpus), str(best.layout), *cells, "; ".join(reasons(best)[:2])])
    for gpus in sizes:
        rows.append(_run_row(studies, gpus))
    costs = ["hours", "GPU-hours", "efficiency", "MFU", "GiB"]
    title = "Scaling (estimated): efficiency is the fewest GPU-hours on any number of GPUs over those here"
    return Table(title, [" stage", "GPUs", " best layout", *costs, " what holds it"], rows)


def _run_row(studies: Sequence[StageStudy], gpus: int) -> list[str]:
    """The whole run on one number of GPUs, stage after stage."""
    found = [study.found[gpus] for study in studies]
    fitting = [best for best in found if best is not None]
    missing = [study.job.name for study, best in zip(studies, found, strict=True) if best is None]
    if missing:
        return ["the run", str(gpus), "does not fit: " + ", ".join(missing), *[""] * 5, ""]
    cheapest = sum(study.cheapest for study in studies)
    cost = sum(best.gpu_hours for best in fitting)
    hours = sum(best.hours for best in fitting)
    return ["the run", str(gpus), "", _hours(hours), f"{cost:,.1f}", f"{cheapest / cost:.0%}", "", "", ""]


def stop_table(studies: Sequence[StageStudy]) -> Table:
    """Where each stage stops paying, and the run with each stage as a job of that size."""
    rows = []
    for study in studies:
        stop = study.stop
        cells = [str(stop.layout.gpus), _hours(stop.hours), f"{stop.gpu_hours:,.1f}"] if stop else ["-", "", ""]
        rows.append([study.job.name, *cells, verdict(study)])
    stops = [study.stop for study in studies if study.stop]
    if len(stops) == len(studies):
        total = [_hours(sum(e.hours for e in stops)), f"{sum(e.gpu_hours for e in stops):,.1f}"]
        rows.append(["the run", "", *total, "every stage as a job of its own size, one after the other"])
    title = "Where it stops paying (estimated): doubling pays while it is at least 1.33 times as fast"
    return Table(title, [" stage", "GPUs", "hours", "GPU-hours", " why"], rows)


def idle_ranks(estimate: Estimate) -> str | None:
    """What to say of a training stage with more data-parallel ranks than a step has pairs."""
    job, layout = estimate.job, estimate.layout
    idle = layout.data_ranks - job.pairs
    if job.model is None or idle <= 0:
        return None
    useful = job.pairs * layout.gpus // layout.data_ranks
    return (
        f"{job.name}: a step of {job.pairs} pairs (data.global_batch_size) leaves {idle} of {layout.data_ranks} "
        f"data-parallel ranks idle; in this layout at most {useful} GPUs have work"
    )


def assumptions(hardware: Hardware, lengths_source: str) -> list[str]:
    """What the numbers rest on, a line each."""
    h = hardware
    return [
        f"Data: {lengths_source}.",
        f"{h.name}: {h.bf16_tflops:g} TFLOPS dense bf16, {h.memory_tb_per_s:g} TB/s, NVLink {h.nvlink_gb_per_s:g} GB/s "
        f"and network {h.network_gb_per_s:g} GB/s one way a GPU, {h.gpus_per_node} GPUs a node.",
        f"Assumed reached: {h.matmul_fraction:.0%} of the matrix rate ({h.attention_fraction:.0%} in attention), "
        f"{h.memory_fraction:.0%} of the memory's, {h.link_fraction:.0%} of the links'; {h.layer_us:g} us a layer, "
        f"{h.latency_us:g} us a collective and {h.step_ms:g} ms a step on top; {h.start_s:g} s to start a job, whose "
        f"weights are read at {h.read_gb_per_s:g} GB/s a node.",
        f"Assumed taken: {h.reserved_gib:g} GiB by CUDA and NCCL, {h.headroom:.0%} by fragmentation.",
        "Left out: checkpoints, exports, validation, failures.",
    ]


def estimate_as_dict(estimate: Estimate, hardware: Hardware) -> dict[str, Any]:
    """Everything about an estimate, for JSON."""
    job = estimate.job
    sizes = group_sizes(estimate.layout.parallel, estimate.layout.replicas)
    return {
        "stage": job.name,
        "method": job.method,
        "model": job.model.name if job.model else None,
        "parameters": job.model.parameters if job.model else None,
        "frozen": [{"model": f.model.name, "parameters": f.model.parameters, "count": f.count} for f in job.frozen],
        "precision": job.precision.name,
        "gpus": estimate.layout.gpus,
        "parallel": dataclasses.asdict(estimate.layout.parallel),
        "data_parallel": estimate.layout.data_ranks,
        "microbatch_tokens": estimate.layout.microbatch_tokens,
        "models_held": estimate.layout.held,
        "memory_bytes": [dataclasses.asdict(stage) | {"peak": stage.peak} for stage in estimate.stages],
        "model_flops_per_step": estimate.model_flops,
        "hardware_flops_per_step": estimate.hardware_flops,
        "traffic_per_step": [
            dataclasses.asdict(traffic) | {"ranks": sizes[traffic.group], "wire": traffic.wire(sizes[traffic.group])}
            for traffic in estimate.traffic
        ],
        "microbatches": estimate.microbatches,
        "busy_data_ranks": estimate.busy_ranks,
        "tokens_per_step": estimate.step_tokens,
        "steps": estimate.steps,
        "start_seconds": estimate.start_seconds,
        "step_seconds": estimate.step_seconds,
        "step_shares": estimate.parts.shares(),
        "tokens_per_second": estimate.tokens_per_second,
        "model_flops_utilisation": estimate.utilisation(hardware),
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
    }


def study_as_dict(study: StageStudy, hardware: Hardware) -> dict[str, Any]:
    """Everything about a stage on several numbers of GPUs, for JSON."""

    def one(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else estimate_as_dict(estimate, hardware)

    return {
        "stage": study.job.name,
        "gpus": {str(gpus): one(best) for gpus, best in study.found.items()},
        "fewest": one(study.least),
        "stops_paying_at": one(study.stop),
        "verdict": verdict(study),
    }
