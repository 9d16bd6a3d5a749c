"""A table as jobs of a cluster: the stages that are not done, and the evaluations behind them."""

import math
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import read_evaluation, read_json
from ctpd_nemo.pipeline.recipe import needed_stages
from ctpd_nemo.pipeline.stages import STATUS
from ctpd_nemo.planner.estimate import Estimate
from ctpd_nemo.planner.jobs import find_jobs
from ctpd_nemo.planner.search import given_layout
from ctpd_nemo.planner.tables import Table
from ctpd_nemo.planner.workload import stated_lengths
from ctpd_nemo.reproduce.config import ReproduceConfig
from ctpd_nemo.reproduce.scores import BENCHMARKS, benchmark_scores
from ctpd_nemo.reproduce.seed import seed_folder

_ROOT = Path(__file__).resolve().parents[2]
# Keys of a command line that are not the pipeline's.
_OURS = (*ReproduceConfig.__dataclass_fields__, "experiment", "run_dir", "seed", "only")


@dataclass(frozen=True)
class ChainJob:
    """A job of the chain.

    Attributes:
        name: The stage, or the stage whose student is evaluated.
        evaluates: Whether it is an evaluation, on one GPU, whose cost nobody plans.
        done: Whether it is complete.
        hours: Of the job, by the planner; ``None`` of an evaluation.
        gpu_hours: Likewise, of all its GPUs.
        command: For each node; of several, ``HEAD`` stands for the first one's name.
    """

    name: str
    evaluates: bool
    done: bool
    hours: float | None
    gpu_hours: float | None
    command: list[str]


def chain(
    asked: ReproduceConfig,
    students: Sequence[str],
    recipe: DictConfig,
    experiment: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
) -> tuple[Table, list[dict[str, Any]]]:
    """The jobs that are missing, printed or submitted, with what each costs.

    Raises:
        InputError: A stage's layout does not divide or fit; Slurm refuses a job.
    """
    values = [one for one in overrides if one.lstrip("+~").split("=", 1)[0].split(".", 1)[0] not in _OURS]
    cells, planned = [], []
    for seed in seeds:
        folder = seed_folder(recipe.run_dir, seed)
        common = [f"experiment={experiment}", *values, f"run_dir={_quoted(folder)}", f"seed={seed}"]
        jobs = _jobs(asked, students, recipe, folder, common)
        missing = [job for job in jobs if not job.done]
        numbers = _submit(asked, missing, common) if asked.launch == "slurm" else {}
        for job in jobs:
            what = f"evaluate {job.name}" if job.evaluates else job.name
            said = "done" if job.done else numbers.get(what, shlex.join(job.command))
            cost = ["-" if one is None else f"{one:,.1f}" for one in (job.hours, job.gpu_hours)]
            cells.append([str(seed), what, str(1 if job.evaluates else asked.gpus), *cost, said])
            planned.append({"seed": seed, **vars(job), "submitted": numbers.get(what)})
        total = sum(job.gpu_hours or 0.0 for job in missing)
        cells.append([str(seed), "what is missing and planned", "", "", f"{total:,.1f}", ""])
    title = f"Jobs of table {asked.table} on {asked.hardware.name}, each after those it builds on (estimates)"
    return Table(title, ["seed", " job", "GPUs", "hours", "GPU-hours", " command"], cells), planned


def _jobs(
    asked: ReproduceConfig, students: Sequence[str], recipe: DictConfig, folder: Path, common: Sequence[str]
) -> list[ChainJob]:
    needed = needed_stages(recipe, list(students))
    costs = _costs(asked, recipe, needed)
    jobs = []
    for name in needed:
        cost = costs[name]
        complete = bool(read_json(folder / name / STATUS).get("complete"))
        command = ["torchrun", *_nodes(asked), "tools/pipeline.py", *common, f"only=[{name}]"]
        jobs.append(ChainJob(name, False, complete, cost.hours, cost.gpu_hours, command))
    for stage in dict.fromkeys(students):
        scores, _ = benchmark_scores(read_evaluation(folder / stage / "export"))
        complete = scores.keys() >= BENCHMARKS.keys()
        command = ["python", "tools/evaluate.py", f"folder={_quoted(folder / stage / 'export')}", "device=cuda"]
        jobs.append(ChainJob(stage, True, complete, None, None, command))
    return jobs


def _node_count(asked: ReproduceConfig) -> int:
    return math.ceil(asked.gpus / asked.hardware.gpus_per_node)


def _nodes(asked: ReproduceConfig) -> list[str]:
    """How ``torchrun`` brings up the processes of a job, one a GPU."""
    nodes = _node_count(asked)
    if nodes == 1:
        return [f"--nproc-per-node={asked.gpus}"]
    return [
        *(f"--nnodes={nodes}", f"--nproc-per-node={asked.hardware.gpus_per_node}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=HEAD:29500"),
    ]


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's command line, where commas, braces and equals signs mean something."""
    text = str(path)
    return text if re.fullmatch(r"[\w./@%+-]+", text) else "'" + text.replace("'", r"\'") + "'"


def _costs(asked: ReproduceConfig, recipe: DictConfig, needed: Sequence[str]) -> dict[str, Estimate]:
    """What the planner says of each stage."""
    config = recipe.copy()
    config.only = list(needed)
    found = find_jobs(config)
    lengths = stated_lengths(asked.workload, max(job.max_length for job in found))
    return {job.name: given_layout(job, asked.gpus, asked.hardware, lengths) for job in found}


def _submit(asked: ReproduceConfig, missing: Sequence[ChainJob], common: Sequence[str]) -> dict[str, str]:
    """Give the jobs to Slurm; what each is called there."""
    nodes = _node_count(asked)
    stages = [job.name for job in missing if not job.evaluates]
    numbers: dict[str, str] = {}
    if stages:
        said = _call([str(_ROOT / "docker/slurm/submit.sh"), *(f"{name}:{nodes}" for name in stages), "--", *common])
        for line in said.splitlines():
            number, stage, *_ = line.split()
            numbers[stage] = number
    for job in missing:
        if job.evaluates:
            after = [f"--dependency=afterok:{numbers[job.name]}"] if job.name in numbers else []
            options = ["--parsable", "--export=ALL", *after]
            script = [str(_ROOT / "docker/slurm/evaluate.sbatch"), *job.command[2:]]
            numbers[f"evaluate {job.name}"] = _call(["sbatch", *options, *script]).split(";")[0].strip()
    return {name: f"Slurm job {number}" for name, number in numbers.items()}


def _call(command: Sequence[str]) -> str:
    try:
        # Not by --export, which would cut a path at a comma.
        environment = {**os.environ, "CTPD_ROOT": str(_ROOT)}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        found = (getattr(error, "stderr", None) or str(error)).strip()
        raise InputError(command[0], found, "Slurm to take the job") from error
