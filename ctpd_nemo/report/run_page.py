"""The job behind ``tools/report.py``: a run as one page."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ctpd_nemo.errors import InputError
from ctpd_nemo.output_paths import output_file
from ctpd_nemo.report.charts import HEIGHT, WIDTH, Chart, Histogram, chart, number, weight_histograms
from ctpd_nemo.report.differences import differences, flat, shown
from ctpd_nemo.report.metric_log import MetricTable
from ctpd_nemo.report.page import write_page
from ctpd_nemo.report.run_folder import Job, read_run

logger = logging.getLogger(__name__)

PAGE = "report.html"
# Metrics that are drawn together, in this order; any other has a chart of its own behind them.
_CHARTS = {
    "loss": ("loss", "val_loss"),
    "margin": ("margin", "val_margin"),
    "accuracy": ("accuracy", "val_accuracy"),
    "tokens a second": ("tokens_per_second",),
    "rewards": ("reward_chosen", "reward_rejected"),
    "log-probs": ("logprob_chosen", "logprob_rejected"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
}
_FACTS = (
    "method",
    "trained",
    "status",
    "seconds",
    "steps",
    "last loss",
    "last margin",
    "last accuracy",
    "tokens/s, median",
    "pairs skipped",
    "responses cut",
)
_NOT_DRAWN = ("tokens", "step_seconds", "skipped", "truncated", "data_wait_seconds", "data_wait_share")


@dataclass
class RunPageConfig:
    """Of which run.

    Attributes:
        run_dir: Folder of a job, or of a pipeline.
        output: The page; null is ``report.html`` in that folder.
    """

    run_dir: str | None = None
    output: str | None = None


@dataclass
class JobView:
    """A job as the page shows it.

    Attributes:
        job: What was read.
        facts: Numbers of the summary, by a name of ``_FACTS``.
        charts: Its curves.
        histograms: Its span weights.
        compared_with: What its config is compared with.
        differences: Key, value there, value here; ``None`` where nothing could be compared, and the text says why.
        config: All keys with their values.
    """

    job: Job
    facts: dict[str, str]
    charts: list[Chart]
    histograms: list[Histogram]
    compared_with: str
    differences: list[tuple[str, str, str]] | None
    config: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


def write_run_page(config: RunPageConfig) -> Path:
    """Write the page.

    Raises:
        InputError: The folder is no run.
    """
    if not config.run_dir:
        raise InputError("run_dir", "nothing", "the run_dir of a job or pipeline")
    run = read_run(Path(config.run_dir))
    path = output_file("output", config.output) if config.output else output_file("run_dir", run.folder / PAGE)
    views = [_view(job) for job in run.jobs]
    facts = [name for name in _FACTS if any(name in view.facts for view in views)]
    return write_page(
        path,
        "run",
        run_name=run.folder.resolve().name,
        run=run,
        views=views,
        facts=facts,
        size=(WIDTH, HEIGHT),
    )


def add_run_page(run_dir: str | Path) -> None:
    """Write the page of a run that has just ended, on its first process; a run is done with or without it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_rank() != 0:
        return
    try:
        path = write_run_page(RunPageConfig(str(run_dir)))
    except (InputError, OSError) as error:
        logger.warning("no %s: %s", PAGE, error)
        return
    logger.info("report: %s", path)


def _view(job: Job) -> JobView:
    notes = [*job.notes, *job.metrics.notes]
    try:
        compared_with, differing = differences(job)
    except InputError as error:
        compared_with, differing = str(error), None
    return JobView(
        job=job,
        facts=_facts(job),
        charts=_charts(job.metrics),
        histograms=weight_histograms(job.metrics),
        compared_with=compared_with,
        differences=differing,
        config=[(key, shown(value)) for key, value in flat(job.config).items()],
        notes=notes,
    )


def _facts(job: Job) -> dict[str, str]:
    method = job.config.get("method")
    facts = {
        "method": str(method.get("name", "")) if isinstance(method, dict) else "",
        "trained": str(job.config.get("policy", "")),
        "status": job.status,
        "seconds": "" if job.seconds is None else f"{job.seconds:,.0f}",
    }
    rows = job.metrics.rows
    if rows:
        facts["steps"] = f"{max(rows):,}"
        for name in ("loss", "margin", "accuracy"):
            if points := job.metrics.series(name):
                facts[f"last {name}"] = number(points[-1][1])
        if rates := [rate for _, rate in job.metrics.series("tokens_per_second")]:
            facts["tokens/s, median"] = number(median(rates))
        for name, title in (("skipped", "pairs skipped"), ("truncated", "responses cut")):
            if counts := job.metrics.series(name):
                facts[title] = f"{sum(count for _, count in counts):,.0f}"
    return facts


def _charts(metrics: MetricTable) -> list[Chart]:
    grouped = {name for names in _CHARTS.values() for name in names}
    others = {
        name: (name, f"val_{name}")
        for name in metrics.names()
        if name not in grouped and not name.startswith("val_") and name not in _NOT_DRAWN
    }
    groups = {**_CHARTS, **others}
    drawn = (chart(title, {name: metrics.series(name) for name in names}) for title, names in groups.items())
    return [found for found in drawn if found is not None]
