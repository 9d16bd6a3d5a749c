"""The planner behind ``tools/plan.py``: from a configuration to tables, and to ``plan.json`` and ``plan.md``."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.pipeline.config import run_config, typed
from ctpd_nemo.planner.estimate import Estimate
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.jobs import Job, find_jobs
from ctpd_nemo.planner.report import (
    assumptions,
    estimate_as_dict,
    idle_ranks,
    layout_table,
    memory_table,
    models_table,
    scaling_table,
    stop_table,
    study_as_dict,
    time_table,
    work_table,
)
from ctpd_nemo.planner.scaling import Study
from ctpd_nemo.planner.search import given_layout, what_fits
from ctpd_nemo.planner.tables import Table
from ctpd_nemo.planner.workload import Lengths, Workload, measured_lengths, stated_lengths


@dataclass
class PlanConfig:
    """What to plan for, beside the experiment.

    Attributes:
        gpus: GPUs of every job; a list of numbers asks how the cost grows from one to the next.
        layout: "given" plans the experiment's own layouts and names the best ones; "best" plans the best ones.
        attention: "fused" as with Transformer Engine, or "local" as without.
        write: Write ``plan.json`` and ``plan.md`` into ``run_dir``.
        hardware: The machine.
        workload: The data.
    """

    gpus: Any = 8
    layout: str = "given"
    attention: str = "fused"
    write: bool = False
    hardware: Hardware = field(default_factory=Hardware)
    workload: Workload = field(default_factory=Workload)


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        heading: A line.
        notes: What the numbers rest on.
        tables: For people.
        values: For programs.
        warnings: What a layout wastes, beside the numbers that show it.
    """

    heading: str
    notes: list[str]
    tables: list[Table]
    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def as_text(self) -> str:
        """For a terminal."""
        warnings = ["\n".join(f"warning: {warning}" for warning in self.warnings)] if self.warnings else []
        tables = (table.as_text() for table in self.tables)
        return "\n\n".join([self.heading, *tables, *warnings, "\n".join(self.notes)])

    def as_markdown(self) -> str:
        """The same."""
        notes = "\n".join([*(f"- Warning: {warning}" for warning in self.warnings), *(f"- {n}" for n in self.notes)])
        return "\n\n".join([f"# {self.heading}", *(table.as_markdown() for table in self.tables), notes]) + "\n"


def plan(config: DictConfig) -> Plan:
    """Plan the stages of an experiment.

    Args:
        config: That of ``pipeline.stages.run_pipeline`` with the keys of :class:`PlanConfig` beside it.

    Raises:
        InputError: A value cannot be used, or a stage's layout does not divide or fit; the line says what would.
    """
    asked, recipe = _split(config)
    sizes = _sizes(asked.gpus)
    for key, choices in (("layout", ("given", "best")), ("attention", ("fused", "local"))):
        if getattr(asked, key) not in choices:
            raise InputError(key, repr(getattr(asked, key)), " or ".join(choices))
    asked.hardware.check()
    asked.workload.check()
    # Another machine's folder, where it is only named.
    recipe.run_dir = str(output_folder("run_dir", recipe.run_dir) if asked.write else recipe.run_dir)
    jobs = find_jobs(recipe, asked.attention)
    if asked.attention == "local" and any(job.precision.fp8 for job in jobs):
        raise InputError("attention", "local with precision.fp8", "fused: FP8 products are Transformer Engine's")
    lengths = _lengths(asked.workload, recipe, jobs)
    if len(sizes) > 1:
        found = _study(jobs, sizes, asked.hardware, lengths)
    else:
        found = _single(jobs, sizes[0], asked.layout, asked.hardware, lengths)
    if asked.write:
        _write(found, Path(recipe.run_dir))
    return found


def _split(config: DictConfig) -> tuple[PlanConfig, DictConfig]:
    """The planner's own keys, and the recipe without them."""
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    own = {one.name: values.pop(one.name) for one in dataclasses.fields(PlanConfig) if one.name in values}
    recipe = OmegaConf.create(values)
    assert isinstance(recipe, DictConfig)
    return typed(PlanConfig, own), recipe


def _sizes(gpus: Any) -> list[int]:
    sizes = list(gpus) if isinstance(gpus, list) else [gpus]
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError("gpus", repr(gpus), "a number of GPUs, or a list of them: [16,64]")
    if not sizes:
        raise InputError("gpus", "an empty list", "a number of GPUs, or a list of them: [16,64]")
    return sorted(set(sizes))


def _lengths(workload: Workload, recipe: DictConfig, jobs: Sequence[Job]) -> Lengths:
    if not workload.measure:
        return stated_lengths(workload, max(job.max_length for job in jobs))
    values = OmegaConf.to_container(recipe)
    assert isinstance(values, dict)
    common = {key: value for key, value in values.items() if key not in ("stages", "only")}
    return measured_lengths(run_config(OmegaConf.create({**common, "method": {"name": "sft"}})), workload.measure)


def _single(jobs: list[Job], gpus: int, layout: str, hardware: Hardware, lengths: Lengths) -> Plan:
    """Every stage on one number of GPUs."""
    study = Study(hardware, lengths)
    best: list[Estimate] = []
    chosen: list[Estimate] = []
    for job in jobs:
        if layout == "given":
            chosen.append(given_layout(job, gpus, hardware, lengths))
        found = study.best(job, gpus)
        if found is None:
            expected = what_fits(job, gpus, hardware, lengths)
            raise InputError(f"stage {job.name}, gpus", f"{gpus} {hardware.name}, on which no layout fits", expected)
        best.append(dataclasses.replace(found, job=job))
    chosen = chosen or best
    tables = [
        models_table(jobs),
        layout_table(chosen, "Layouts" if layout == "best" else "Layouts of the experiment"),
        memory_table(chosen, hardware),
        work_table(chosen),
        time_table(chosen, hardware),
    ]
    if layout == "given":
        tables += [layout_table(best, f"The best layouts on {gpus} GPUs"), time_table(best, hardware)]
    warnings = [one for one in map(idle_ranks, chosen) if one]
    values = {
        "warnings": warnings,
        "stages": [estimate_as_dict(one, hardware) for one in chosen],
        "best": [estimate_as_dict(one, hardware) for one in best],
    }
    plan = _plan(f"Plan for {gpus} {hardware.name}", tables, values, hardware, lengths)
    return dataclasses.replace(plan, warnings=warnings)


def _study(jobs: list[Job], sizes: list[int], hardware: Hardware, lengths: Lengths) -> Plan:
    """How the cost grows with GPUs."""
    study = Study(hardware, lengths)
    studies = [study.stage(job, sizes) for job in jobs]
    tables = [models_table(jobs), scaling_table(studies, sizes, hardware), stop_table(studies)]
    values = {"scaling": [study_as_dict(one, hardware) for one in studies]}
    numbers = ", ".join(str(size) for size in sizes)
    heading = f"How the cost grows from {numbers} {hardware.name}"
    return _plan(heading, tables, values, hardware, lengths)


def _plan(heading: str, tables: list[Table], values: dict[str, Any], hardware: Hardware, lengths: Lengths) -> Plan:
    notes = ["Estimates, not measurements. They rest on:", *assumptions(hardware, lengths.source)]
    values |= {"hardware": dataclasses.asdict(hardware), "data": lengths.source}
    return Plan(heading, notes, tables, values)


def _write(found: Plan, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(found.values, indent=2) + "\n", encoding="utf-8")
    (folder / "plan.md").write_text(found.as_markdown(), encoding="utf-8")
