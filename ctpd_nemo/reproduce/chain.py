"""A table as jobs of a cluster: the stages that are not done, and the evaluations behind them."""

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
from ctpd_nemo.evaluation.card import read_evaluation
from ctpd_nemo.pipeline.recipe import needed_stages
from ctpd_nemo.pipeline.stage_status import read_status
from ctpd_nemo.pipeline.stages import settings_of_stages
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
        outdated: Whether what is there was made with other settings.
        hours: Of the job, by the planner; ``None`` of an evaluation.
        gpu_hours: Likewise, of all its GPUs.
        command: For each node; of several, ``HEAD`` stands for the first one's name.
    """

    name: str
    evaluates: bool
    done: bool
    outdated: bool
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
        folder = _quoted(seed_folder(recipe.run_dir, seed))
        common = [f"experiment={experiment}", *values, f"run_dir={folder}", f"seed={seed}"]
        jobs = _jobs(asked, students, recipe, seed, common)
        missing = [job for job in jobs if not job.done]
        numbers = _submit(asked, missing, common) if asked.launch == "slurm" else {}
        for job in jobs:
            what = f"evaluate {job.name}" if job.evaluates else job.name
            shown = f"{what} (again: settings have changed)" if job.outdated else what
            said = "done" if job.done else numbers.get(what, shlex.join(job.command))
            cost = ["-" if one is None else f"{one:,.1f}" for one in (job.hours, job.gpu_hours)]
            cells.append([str(seed), shown, str(1 if job.evaluates else asked.gpus), *cost, said])
            planned.append({"seed": seed, **vars(job), "submitted": numbers.get(what)})
        total = sum(job.gpu_hours or 0.0 for job in missing)
        cells.append([str(seed), "what is missing and planned", "", "", f"{total:,.1f}", ""])
    title = f"Jobs of table {asked.table} on {asked.hardware.name}, each after those it builds on (estimates)"
    return Table(title, ["seed", " job", "GPUs", "hours", "GPU-hours", " command"], cells), planned


def _jobs(
    asked: ReproduceConfig, students: Sequence[str], recipe: DictConfig, seed: int, common: Sequence[str]
) -> list[ChainJob]:
    needed = needed_stages(recipe, list(students))
    costs = _costs(asked, recipe, needed)
    done, outdated = _standing(recipe, seed, needed)
    folder = seed_folder(recipe.run_dir, seed)
    jobs = []
    for name in needed:
        cost = costs[name]
        command = ["torchrun", *_nodes(asked), "tools/pipeline.py", *common, f"only=[{name}]"]
        jobs.append(ChainJob(name, False, name in done, name in outdated, cost.hours, cost.gpu_hours, command))
    for stage in dict.fromkeys(students):
        scores, _ = benchmark_scores(read_evaluation(folder / stage / "export"))
        complete = stage not in outdated and scores.keys() >= BENCHMARKS.keys()
        command = ["python", "tools/evaluate.py", f"folder={_quoted(folder / stage / 'export')}", "device=cuda"]
        jobs.append(ChainJob(stage, True, complete, stage in outdated, None, None, command))
    return jobs


def _standing(recipe: DictConfig, seed: int, needed: Sequence[str]) -> tuple[set[str], set[str]]:
    """The stages that are complete with the settings of today, and those that have begun with other ones.

    Whether weights and data are those of today as well is not looked at, which would read terabytes: a job that is
    given out looks itself, and does again what has changed.
    """
    folder = seed_folder(recipe.run_dir, seed)
    config = recipe.copy()
    config.run_dir, config.seed = str(folder), seed
    done, outdated = set(), set()
    for name, settings in settings_of_stages(config, needed).items():
        status = read_status(folder / name)
        if status is not None and status.settings not in ("", settings):
            outdated.add(name)
        elif status is not None and status.complete:
            done.add(name)
    return done, outdated


def _node_count(asked: ReproduceConfig) -> int:
    return max(asked.gpus // asked.hardware.gpus_per_node, 1)


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
