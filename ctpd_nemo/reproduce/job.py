"""What ``tools/reproduce.py`` does: a table of the paper, from what is there to what is written down."""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ctpd_nemo.errors import InputError
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.pipeline.recipe import needed_stages
from ctpd_nemo.planner.tables import Table
from ctpd_nemo.reproduce.chain import chain
from ctpd_nemo.reproduce.config import ReproduceConfig, TableConfig, read_table, split_config
from ctpd_nemo.reproduce.pool import run_seeds
from ctpd_nemo.reproduce.scores import benchmark_scores, read_scores, tiny_scores
from ctpd_nemo.reproduce.tables import as_values, difference_table, score_table, seed_table

logger = logging.getLogger(__name__)

_TINY_SEEDS = [0, 1, 2, 3]


def reproduce(config: DictConfig, experiment: str, overrides: Sequence[str] = ()) -> list[Table]:
    """Run or hand out what is missing of a table, and write it as ``table-N.md`` and ``table-N.json``.

    Args:
        config: Of ``conf/reproduce.yaml``. Without a student of its own it is run in a tiny world; with one its jobs
            are printed or submitted, and the table has what is evaluated so far.
        experiment: Name of the experiment: the paper's figures are those of an experiment, and jobs are given it.
        overrides: The command line, for jobs.

    Returns:
        What is to be shown.

    Raises:
        InputError: A value, file or folder cannot be used.
    """
    for given in overrides:
        if given.lstrip("+").startswith("seed="):
            raise InputError("seed", given.partition("=")[2], "seeds=[...], all that the table is over")
    asked, recipe = split_config(config)
    table = read_table(asked.table, asked.rows)
    if recipe.run_dir is None:
        recipe.run_dir = f"runs/tables/{experiment}"
    recipe.run_dir = str(output_folder("run_dir", recipe.run_dir))
    # Before anything is run: every stage of the table is there.
    needed_stages(recipe, list(table.rows.values()))
    if recipe.model.student.path is None:
        return _tiny(asked, table, recipe, experiment)
    return _jobs(asked, table, recipe, experiment, overrides)


def _tiny(asked: ReproduceConfig, table: TableConfig, recipe: DictConfig, experiment: str) -> list[Table]:
    seeds = _TINY_SEEDS if asked.seeds is None else asked.seeds
    students = list(table.rows.values())
    started = time.perf_counter()
    runs = run_seeds(recipe, asked.world, asked.evaluation, seeds, students, asked.processes)
    seconds = time.perf_counter() - started
    # Students that are done in another table as well take no time here.
    done = {str(seed): run for seed, run in zip(seeds, runs, strict=True)}
    rows = read_scores(recipe.run_dir, table, seeds, tiny_scores)
    tables = [score_table(table, rows, seeds, {})]
    if len(seeds) > 1:
        tables.append(seed_table(table, rows, seeds))
    if table.against in table.rows and len(table.rows) > 1:
        tables.append(difference_table(table, rows))
    cost = {"seconds": round(seconds, 1), "runs": done, "processes": asked.processes, "cores": os.cpu_count()}
    values = {"experiment": experiment, "seeds": seeds, "n_test": asked.world.n_test, **cost}
    _write(table, recipe, tables, values | as_values(rows, table))
    logger.info("table %d: %.0f s", table.number, seconds)
    return tables


def _jobs(
    asked: ReproduceConfig, table: TableConfig, recipe: DictConfig, experiment: str, overrides: Sequence[str]
) -> list[Table]:
    seeds = [0] if asked.seeds is None else asked.seeds
    jobs, planned = chain(asked, list(table.rows.values()), recipe, experiment, overrides, seeds)
    outdated = {(job["seed"], job["name"]) for job in planned if job["outdated"]}
    rows = read_scores(recipe.run_dir, table, seeds, benchmark_scores, outdated)
    tables = [jobs, score_table(table, rows, seeds, table.paper.get(experiment, {}))]
    values = {"experiment": experiment, "seeds": seeds, "jobs": planned, "paper": table.paper.get(experiment)}
    _write(table, recipe, tables[1:], values | as_values(rows, table))
    return tables


def _write(table: TableConfig, recipe: DictConfig, tables: Sequence[Table], values: dict[str, Any]) -> None:
    folder, name = Path(recipe.run_dir), f"table-{table.number}"
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(one.as_markdown() for one in tables)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
