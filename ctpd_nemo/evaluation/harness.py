"""The six tasks of the Open LLM Leaderboard through lm-evaluation-harness (the extra ``eval``).

Prompts, choices, metrics and standard errors are the harness's own. With a folder of local rows its tasks read those
instead of their datasets, and nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.local_rows import Fields, read_local_rows
from ctpd_nemo.evaluation.model import load_model

logger = logging.getLogger(__name__)

Prepared = dict[str, tuple[dict[str, Any], Any]]
"""For each task what this project says of it, and what the harness is asked to run."""

_TASKS = Path(__file__).parent / "tasks"
_LOCAL = "local"
_DATA = "a network or a cache that has the harness's datasets, or a folder of local rows"


def known_tasks() -> list[str]:
    """Names of the tasks, as files in ``tasks``."""
    return sorted(path.stem for path in _TASKS.glob("*.yaml"))


def run_harness(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = "auto",
    dtype: str = "auto",
    max_length: int | None = None,
    seed: int = 1234,
    prepared: Prepared | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a Hugging Face folder on benchmarks; no code of the folder is run.

    Args:
        folder: Model and tokenizer.
        tasks: Of :func:`known_tasks`.
        data: Folder of local rows, see ``local_rows``; ``None`` for the harness's own datasets, over the network.
        num_fewshot: Examples before each question; ``None`` for each task's number on the leaderboard.
        limit: Only the first so many questions of a task; of each subject for ``mmlu``.
        batch_size: Sequences a forward pass.
        device: As ``torch`` names it; ``auto`` is a GPU where there is one.
        dtype: As ``torch`` names it; ``auto`` keeps that of the stored weights.
        max_length: Longest sequence in tokens; ``None`` for the model's own. Longer ones lose their beginning.
        seed: Of the choice of examples.
        prepared: What :func:`prepare_tasks` has made of ``tasks``, where it was called before.

    Returns:
        For each task ``metric``, ``value``, ``standard_error`` (of the harness; ``None`` where it gives none), ``n``
        questions, ``num_fewshot``, ``limit``, ``source`` and the harness's ``version``.

    Raises:
        InputError: The harness is not installed, a task is not known, rows cannot be used, or datasets are out of
            reach; the folder holds no usable model, or other weights than its config describes.
    """
    prepared = prepared or prepare_tasks(tasks, data=data, num_fewshot=num_fewshot)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from ctpd_nemo.data.tokenizer_folder import load_tokenizer

    # The harness would draw weights that are missing at random, and score them.
    tokenizer = load_tokenizer(str(folder))
    model = HFLM(
        pretrained=load_model(folder, device, dtype), tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    found = {}
    for name, (spec, asked) in prepared.items():
        logger.info("%-15s %d examples before each question", name, spec["num_fewshot"])
        with _reaching(name, data):
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[asked],
                num_fewshot=spec["num_fewshot"],
                limit=limit,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        found[name] = _result(spec, results, data, lm_eval.__version__) | {"limit": limit}
    return found


def prepare_tasks(tasks: Sequence[str], *, data: str | Path | None = None, num_fewshot: int | None = None) -> Prepared:
    """Find or read all that benchmarks need beside a model, before there is one; datasets of the Hub stay in its cache.

    Args:
        tasks: Of :func:`known_tasks`.
        data: As of :func:`run_harness`.
        num_fewshot: Likewise.

    Raises:
        InputError: As of :func:`run_harness`.
    """
    specs = {name: _spec(name, num_fewshot) for name in tasks}
    _harness()
    asked = {name: (spec, _task(spec, data)) for name, spec in specs.items()}
    if data is None:
        from lm_eval.tasks import get_task_dict

        for name, (_, task) in asked.items():
            with _reaching(name, data):
                get_task_dict([task])
    return asked


@contextlib.contextmanager
def _reaching(name: str, data: str | Path | None) -> Iterator[None]:
    """Errors of the Hub, or of a cache of it, as what they are to a user."""
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split())[:300]
        raise InputError("tasks.data", f"{data or 'null'}, and no data of {name} ({said})", _DATA) from error


def is_leaderboards(name: str, result: Mapping[str, Any]) -> bool:
    """Whether a result is of all questions, behind as many examples as on the leaderboard."""
    shots = _spec(name, None)["num_fewshot"]
    return result.get("limit") is None and result.get("num_fewshot", shots) == shots


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            "tasks", f"no harness ({error})", "pip install 'ctpd-nemo[eval]', or tasks.names=[]"
        ) from error
    return lm_eval


def _spec(name: str, num_fewshot: int | None) -> dict[str, Any]:
    if name not in known_tasks():
        raise InputError("tasks.names", repr(name), "of " + ", ".join(known_tasks()))
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError("tasks.num_fewshot", str(num_fewshot), "0 or more")
    spec: Any = OmegaConf.to_container(OmegaConf.load(_TASKS / f"{name}.yaml"))
    if num_fewshot is not None:
        spec["num_fewshot"] = num_fewshot
    return spec


def _task(spec: dict[str, Any], data: str | Path | None) -> Any:
    """What the harness is asked to run: one of its tasks by name, or with its datasets replaced."""
    if data is None:
        return spec["task"]
    rows, examples = read_local_rows(Path(data), spec["file"])
    place = str(Path(data) / f"{spec['file']}{'' if examples is None else '_fewshot'}.jsonl")
    if spec["task"] != "mmlu":
        return _group([_local(spec["task"], rows, examples, spec["num_fewshot"], place)])
    subjects = sorted({row["subject"] for row in rows})
    members = []
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        # A subject's few rows are all asked: without a file of examples, those come from other subjects.
        others = [row for row in (examples or rows) if (row["subject"] == subject) is (examples is not None)]
        members.append(_local(f"mmlu_{subject}", own, others, spec["num_fewshot"], f"{place}, subject {subject!r}"))
    return _group(members)


def _group(members: list[dict[str, Any]]) -> dict[str, Any]:
    # Only members of a group inherit from the registered task that they name; by itself it would be a whole config.
    return {"group": _LOCAL, "task": members}


def _local(name: str, rows: list[Fields], examples: list[Fields] | None, shots: int, place: str) -> dict[str, Any]:
    """The harness's task of that name over our rows."""
    available = len(rows) - 1 if examples is None else len(examples)
    if shots > available:
        raise InputError(place, f"{available} rows for examples", f"{shots} (tasks.num_fewshot)")
    return {
        "task": name,
        "custom_dataset": _dataset(rows, examples),
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        # The harness leaves the question itself out of examples that are drawn from the split that is asked.
        "fewshot_split": "test" if examples is None else "fewshot",
    }


def _dataset(rows: list[Fields], examples: list[Fields] | None) -> Callable[..., Any]:
    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        splits = {"test": rows} if examples is None else {"test": rows, "fewshot": examples}
        return DatasetDict({name: Dataset.from_list(found) for name, found in splits.items()})

    return load


def _result(spec: dict[str, Any], results: Any, data: str | Path | None, version: str) -> dict[str, Any]:
    metric, _, chosen = spec["metric"].partition(",")
    counts = {name: count["effective"] for name, count in results["n-samples"].items()}
    if spec["task"] in results["results"]:
        scores = results["results"][spec["task"]]
        value, error = scores[spec["metric"]], scores.get(f"{metric}_stderr,{chosen}")
    else:
        value, error = _over_subjects(spec["metric"], f"{metric}_stderr,{chosen}", results["results"], counts)
    return {
        "metric": metric,
        "value": float(value),
        "standard_error": float(error) if isinstance(error, int | float) else None,
        "n": sum(counts.values()),
        "num_fewshot": spec["num_fewshot"],
        "source": "the harness's dataset" if data is None else f"{Path(data).name}/{spec['file']}.jsonl",
        "version": version,
    }


def _over_subjects(metric: str, stderr: str, results: Any, counts: dict[str, int]) -> tuple[float, float | None]:
    """Mean over the questions of all subjects, and the harness's pooled standard error, as in its own group."""
    from lm_eval.api.metrics import pooled_sample_stderr

    values, sizes = [results[name][metric] for name in counts], list(counts.values())
    errors = [results[name][stderr] for name in counts]
    mean = sum(value * n for value, n in zip(values, sizes, strict=True)) / sum(sizes)
    # A subject of a single question has no standard error.
    if not all(isinstance(error, int | float) for error in errors):
        return mean, None
    return mean, float(pooled_sample_stderr(errors, sizes))
