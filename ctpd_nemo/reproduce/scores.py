"""The scores of students over seeds: what is read, and the arithmetic."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import EVALUATION, read_json
from ctpd_nemo.evaluation.harness import is_leaderboards
from ctpd_nemo.reproduce.config import TableConfig
from ctpd_nemo.reproduce.seed import seed_folder
from ctpd_nemo.reproduce.significance import p_value, t_interval

# One student's scores by column; a seed that is not evaluated has none.
Scores = Mapping[str, float]

AVERAGE = "Average"
_CHOSEN = "log p(chosen)"
# The paper's six benchmarks: title, task in ``evaluation.tasks``.
BENCHMARKS = {
    "HellaSwag": "hellaswag",
    "ARC": "arc_challenge",
    "MMLU": "mmlu",
    "TruthfulQA": "truthfulqa_mc2",
    "WinoGrande": "winogrande",
    "GSM8K": "gsm8k",
}


@dataclass(frozen=True)
class Cell:
    """A score over seeds.

    Attributes:
        mean: Over the seeds.
        standard_error: Sample standard deviation over the root of their number; with one seed that of the evaluation,
            if it has one.
        values: Of each seed, in their order.
    """

    mean: float
    standard_error: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], of_evaluation: float | None = None) -> "Cell":
        """From one value a seed."""
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else of_evaluation
        return cls(fmean(values), error, tuple(values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean over all seeds that there could be lies, at 95 %; ``None`` with one seed."""
        if self.standard_error is None or len(self.values) < 2:
            return None
        return t_interval(self.mean, self.standard_error, len(self.values))

    @property
    def p_value(self) -> float | None:
        """Of a mean of 0 over all seeds, by Student's t; ``None`` with one seed."""
        if self.standard_error is None or len(self.values) < 2:
            return None
        return p_value(self.mean, self.standard_error, len(self.values))

    def less(self, other: "Cell") -> "Cell":
        """The difference to another row of the same seeds, seed by seed: what all rows of a seed share cancels."""
        return Cell.of([mine - its for mine, its in zip(self.values, other.values, strict=True)])


def tiny_scores(evaluation: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of a student of a tiny world: shares in %, then the log-likelihood; no standard errors."""
    found = evaluation["preferences"]
    shares = {
        "answers, greedy": found["answer_accuracy"],
        "answers, T = 1": found["sampled_answer_accuracy"],
        "preference a token": found["preference_accuracy_per_token"],
        "wrong answers": found["preference_accuracy_by_fault"]["wrong"],
    }
    scores = {title: 100 * share for title, share in shares.items()}
    return {**scores, AVERAGE: fmean(scores.values()), _CHOSEN: found["chosen_logprob"]}, {}


def benchmark_scores(evaluation: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of a student in %, and their standard errors; the average where all six are there.

    A trial on a few questions, or with other examples, is no score that could stand beside the paper's.
    """
    tasks = evaluation.get("tasks") or {}
    there = {
        title: tasks[name] for title, name in BENCHMARKS.items() if name in tasks and is_leaderboards(name, tasks[name])
    }
    scores = {title: 100 * task["value"] for title, task in there.items()}
    errors = {
        title: 100 * task["standard_error"] for title, task in there.items() if task["standard_error"] is not None
    }
    if len(scores) == len(BENCHMARKS):
        scores[AVERAGE] = fmean(scores.values())
    return scores, errors


def read_scores(
    run_dir: str | Path,
    table: TableConfig,
    seeds: Sequence[int],
    scores_of: Callable[[Mapping[str, Any]], tuple[dict[str, float], dict[str, float]]],
    left_out: Collection[tuple[int, str]] = (),
) -> dict[str, dict[str, Cell]]:
    """For each row its cells by column; a column is there where every seed has it.

    Args:
        run_dir: Has a folder for each seed.
        table: The rows.
        seeds: The seeds.
        scores_of: What to take from an evaluation: scores and their standard errors.
        left_out: Seeds and stages that count as not evaluated.

    Raises:
        InputError: An evaluation is not what ``evaluate`` writes.
    """
    rows: dict[str, dict[str, Cell]] = {}
    for name, stage in table.rows.items():
        paths = [seed_folder(run_dir, seed) / stage / "export" / EVALUATION for seed in seeds]
        found = [
            ({}, {}) if (seed, stage) in left_out else _read(path, scores_of)
            for seed, path in zip(seeds, paths, strict=True)
        ]
        titles = [title for title in found[0][0] if all(title in scores for scores, _ in found)]
        rows[name] = {
            title: Cell.of([scores[title] for scores, _ in found], found[0][1].get(title)) for title in titles
        }
    return rows


def _read(
    path: Path, scores_of: Callable[[Mapping[str, Any]], tuple[dict[str, float], dict[str, float]]]
) -> tuple[dict[str, float], dict[str, float]]:
    evaluation = read_json(path)
    if not evaluation:
        return {}, {}
    try:
        return scores_of(evaluation)
    except (KeyError, TypeError) as error:
        raise InputError(
            str(path), f"what no evaluation wrote ({error!r})", "an evaluation of tools/evaluate.py"
        ) from error
