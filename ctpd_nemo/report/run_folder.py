"""What a run folder holds: one job, or the stages of a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import EVALUATION, evaluation_rows, read_json
from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.score_cache import read_manifest
from ctpd_nemo.report.metric_log import MetricTable, read_metrics

_METRICS, _CONFIG, _STATUS, _REPORT = "metrics.jsonl", "config.json", "stage.json", "report.json"
T = TypeVar("T")

# Value and standard error.
Cell = tuple[float, float | None]


@dataclass
class Job:
    """One training or scoring job.

    Attributes:
        name: Of its folder.
        folder: Where it ran.
        config: Every value it ran with; empty where it wrote none.
        metrics: What it logged.
        status: ``complete``, ``unfinished``, or ``unknown`` for a job outside a pipeline.
        seconds: Wall time of a complete stage.
        scored: Of a scoring stage: roles, pairs and precision of its cache, by name.
        notes: What could not be read.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: MetricTable
    status: str
    seconds: float | None
    scored: dict[str, str]
    notes: list[str]


@dataclass
class Comparison:
    """A table of what was evaluated.

    Attributes:
        title: Where it comes from.
        columns: Models.
        rows: For each metric of each dataset: both names, number of examples, and what each column has.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, str, int, list[Cell | None]]]


@dataclass
class RunFolder:
    """A run.

    Attributes:
        folder: The folder.
        jobs: Its jobs, in the order of the recipe.
        comparisons: What was evaluated.
        notes: What could not be read.
    """

    folder: Path
    jobs: list[Job]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; what is damaged is named in the notes, and the rest is read.

    Raises:
        InputError: No run.
    """
    if not folder.is_dir():
        raise InputError("run_dir", f"no folder {str(folder)!r}", "the run_dir of a job or pipeline")
    folders = [folder] if _is_job(folder) else _stage_folders(folder)
    if not folders:
        raise InputError(str(folder), "no job and no stages", "the run_dir of a job or pipeline")
    notes: list[str] = []
    jobs = [_read_job(path) for path in folders]
    report = _tried(read_json, folder / _REPORT, notes) or {}
    evaluated = {}
    for job in jobs:
        if found := _tried(read_json, job.folder / "export" / EVALUATION, notes):
            evaluated[job.name] = found
    methods = report.get("methods")
    told = {name: {"preferences": scores} for name, scores in methods.items()} if isinstance(methods, dict) else {}
    comparisons = [
        table
        for title, found in ((f"held-out pairs, {_REPORT}", told), (f"{EVALUATION} of the exports", evaluated))
        if (table := _comparison(title, found, notes)) is not None
    ]
    return RunFolder(folder, jobs, comparisons, notes)


def _is_job(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_METRICS, _CONFIG, _STATUS))


def _stage_folders(folder: Path) -> list[Path]:
    """The stages of a pipeline; what was moved aside when inputs changed is left out."""
    order = {stage.name: place for place, stage in enumerate(STAGES)}
    found = [path for path in folder.iterdir() if path.is_dir() and _is_job(path) and ".old-" not in path.name]
    return sorted(found, key=lambda path: (order.get(path.name, len(order)), path.name))


def _read_job(folder: Path) -> Job:
    notes: list[str] = []
    status = _tried(read_json, folder / _STATUS, notes) or {}
    seconds = status.get("seconds")
    complete = {"True": "complete", "False": "unfinished"}.get(str(status.get("complete")), "unknown")
    cache = folder / "cache"
    manifest = _tried(read_manifest, cache, notes) if cache.is_dir() else None
    scored = {}
    if manifest:
        scored = {
            "roles": ", ".join(map(str, manifest["teacher_weights"])),
            "pairs": f"{manifest['pairs']:,}",
            "precision": str(manifest["fingerprints"].get("precision")),
        }
    return Job(
        name=folder.resolve().name,
        folder=folder,
        config=_tried(read_json, folder / _CONFIG, notes) or {},
        metrics=_tried(read_metrics, folder / _METRICS, notes) or MetricTable(),
        status=complete,
        seconds=float(seconds) if complete == "complete" and isinstance(seconds, int | float) else None,
        scored=scored,
        notes=notes,
    )


def _tried(read: Callable[[Path], T], path: Path, notes: list[str]) -> T | None:
    """What is read; ``None``, and a note, where it cannot be."""
    try:
        return read(path)
    except (InputError, OSError) as error:
        notes.append(str(error))
        return None


def _comparison(title: str, evaluations: dict[str, dict[str, Any]], notes: list[str]) -> Comparison | None:
    """The metrics of several evaluations side by side; ``None`` where there are none."""
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    examples: dict[tuple[str, str], int] = {}
    columns = []
    for name, evaluation in evaluations.items():
        try:
            rows = evaluation_rows(evaluation)
            read = [
                ((str(row["dataset"]), str(row["metric"])), int(row["n"]), float(row["value"]), row["standard_error"])
                for row in rows
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"{title}, {name}: not an evaluation ({error!r})")
            continue
        columns.append(name)
        for metric, n, value, spread in read:
            cells.setdefault(metric, {})[name] = value, spread if isinstance(spread, int | float) else None
            examples[metric] = max(n, examples.get(metric, 0))
    if not cells:
        return None
    table = [(*metric, examples[metric], [row.get(name) for name in columns]) for metric, row in cells.items()]
    return Comparison(title, columns, table)
