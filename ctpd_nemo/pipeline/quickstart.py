"""The recipe from nothing: make a tiny world, run every stage on it, evaluate the students, report."""

import json
import logging
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.preferences import Evaluation, evaluate_folder
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.pipeline.config import typed
from ctpd_nemo.pipeline.preflight import check_encoded
from ctpd_nemo.pipeline.recipe import find_stages
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline, settings_of_stages
from ctpd_nemo.pipeline.tiny_world.build import build_tiny_world

logger = logging.getLogger(__name__)

# The students that are compared, and the stage each comes from.
_STUDENTS = {"sft": "sft_student", "dpo": "dpo_student", "ctpd": "ctpd"}
_COLUMNS = {
    "preference accuracy": "preference_accuracy",
    "per token": "preference_accuracy_per_token",
    "reward margin": "reward_margin",
    "log p(chosen)": "chosen_logprob",
    "answer accuracy": "answer_accuracy",
}


@dataclass
class WorldConfig:
    """The tiny world, see :func:`ctpd_nemo.pipeline.tiny_world.build.build_tiny_world`."""

    n_train: int = 2400
    n_test: int = 300


def quickstart(config: DictConfig) -> dict[str, Any]:
    """Run the recipe in a tiny world and write ``report.json`` into the run folder.

    Args:
        config: That of ``run_pipeline``, with ``world.n_train`` and ``world.n_test``.

    Returns:
        The report: ``methods`` (an ``Evaluation`` of each student), ``stages`` (seconds of each), ``seconds``,
        ``peak_memory_gb`` of the largest process and ``export_dir`` of the CTPD student.
    """
    started = time.perf_counter()
    folder = output_folder("run_dir", config.run_dir)
    # The last stage of a pipeline has its folder below; that of a world is made first.
    check_encoded(str(folder / "ctpd"), config.data.encoded)
    _check_students(config)
    world = typed(WorldConfig, config.world, "world")
    whole = _with_world(config, folder / "world")
    # Every value has its type before a world is made.
    settings_of_stages(whole, [stage.name for stage in find_stages(whole)])
    set_deterministic(bool(config.get("deterministic")))
    initialize(ParallelConfig(timeout_minutes=typed(ParallelConfig, config.parallel, "parallel").timeout_minutes))
    if dist.get_rank() == 0:
        build_tiny_world(folder / "world", **vars(world), seed=config.seed)
    dist.barrier()
    results = run_pipeline(whole)
    report: dict[str, Any] = {}
    if dist.get_rank() == 0:
        report = _report(results, folder / "world" / "test.jsonl", started)
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(_table(report))
        print(f"\nreport: {folder / 'report.json'}")
    dist.barrier()
    return report


def _check_students(config: DictConfig) -> None:
    """Stop where a stage is left out whose student is to be compared."""
    if config.get("only") is not None:
        raise InputError("only", str(config.only), "null: the quickstart runs all stages, tools/pipeline.py some")
    stages = {stage.name for stage in find_stages(config)}
    for name in _STUDENTS.values():
        if name not in stages:
            raise InputError(f"stages.{name}", "null", "a stage: the quickstart compares its student with the others")


def _with_world(config: DictConfig, world: Path) -> DictConfig:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    del values["world"]
    merged = OmegaConf.create(values)
    merged.model.student.path = str(world / "student")
    merged.model.teacher.path = str(world / "teacher")
    merged.data.train = [str(world / "train.jsonl")]
    return merged


def _report(results: Mapping[str, StageResult], test: Path, started: float) -> dict[str, Any]:
    reference = results["sft_student"].output
    evaluations: dict[str, Evaluation] = {}
    for name, stage in _STUDENTS.items():
        evaluations[name] = evaluate_folder(results[stage].output, test, reference=reference)
    # Linux counts in KiB; the largest of this process and the dataloader workers it has waited for.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "methods": {name: evaluation.as_dict() for name, evaluation in evaluations.items()},
        "stages": {
            name: {"seconds": round(result.seconds, 1), "skipped": result.skipped} for name, result in results.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(peak / 2**20, 2),
        "export_dir": str(results["ctpd"].output),
    }


def _table(report: dict[str, Any]) -> str:
    """The comparison, and one generation of the exported student, as text for a terminal."""
    lines = ["", f"{'student':<9}" + "".join(f"{title:>21}" for title in _COLUMNS)]
    for name, scores in report["methods"].items():
        lines.append(f"{name:<9}" + "".join(f"{scores[key]:>21.3f}" for key in _COLUMNS.values()))
    scores = next(iter(report["methods"].values()))
    pairs = f"{scores['n']} held-out pairs about {scores['facts']['preference_accuracy']} facts"
    lines += ["", f"{pairs}; {report['seconds']:.0f} s, {report['peak_memory_gb']} GB at most in one process"]
    lines += [f"the CTPD student, for transformers: {report['export_dir']}"]
    sample = report["methods"]["ctpd"]["samples"][0]
    lines += [f"  asked:   {sample['prompt']}", f"  answers: {sample['response']}"]
    return "\n".join(lines)
