"""One seed of a table in a tiny world: its world, the stages of the table, and each student evaluated once."""

import hashlib
import json
import logging
import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.evaluation.card import EVALUATION, read_json
from ctpd_nemo.evaluation.evaluate import EvaluateConfig, PairsConfig, TasksConfig, evaluate
from ctpd_nemo.pipeline.recipe import needed_stages
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.reproduce.config import StudentEvaluation, WorldConfig

logger = logging.getLogger(__name__)

_EVALUATED = "evaluated.json"


def seed_folder(run_dir: str | Path, seed: int) -> Path:
    """Where everything of one seed is."""
    return Path(run_dir) / f"seed-{seed}"


def run_seed(
    recipe: DictConfig, world: WorldConfig, asked: StudentEvaluation, seed: int, students: Sequence[str]
) -> dict[str, Any]:
    """Run what is missing of some students' stages, and evaluate the students that are not yet evaluated.

    The seed is that of the world (its pairs and the first weights of both models), of the order of the data and of
    what a method draws.

    Args:
        recipe: Config of the pipeline; its models, data, seed and folder are those of the seed's world.
        world: The world.
        asked: How students are evaluated.
        seed: The seed.
        students: Stages that train them.

    Returns:
        ``stage_seconds`` of each stage that was not there before, and ``cpu_seconds`` of this call.
    """
    before = _cpu_seconds()
    folder = seed_folder(recipe.run_dir, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = _in_world(recipe, world.build(folder / "world", seed), folder, seed)
    config.only = needed_stages(config, list(students))
    results = run_pipeline(config)
    seconds = {name: round(result.seconds, 1) for name, result in results.items() if not result.skipped}
    for name in students:
        _evaluate(name, results[name], folder / "world" / "test.jsonl", asked, config.data.max_length)
    return {"stage_seconds": seconds, "cpu_seconds": round(_cpu_seconds() - before, 1)}


def _cpu_seconds() -> float:
    """Of this process and those it has waited for: what does not depend on who else is at work on the machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _in_world(recipe: DictConfig, world: TinyWorld, folder: Path, seed: int) -> DictConfig:
    config = OmegaConf.merge(
        OmegaConf.create(OmegaConf.to_container(recipe, resolve=True)),
        {
            "model": {"student": {"path": str(world.student)}, "teacher": {"path": str(world.teacher)}},
            "data": {"train": [str(world.train)]},
            "run_dir": str(folder),
            "seed": seed,
        },
    )
    for stage in ("sft_teacher", "sft_student"):
        OmegaConf.update(config, f"stages.{stage}.data.train", [str(world.sft)], force_add=True)
    assert isinstance(config, DictConfig)
    return config


def _evaluate(name: str, result: StageResult, test: Path, asked: StudentEvaluation, max_length: int) -> None:
    """``evaluation.json`` in the export, unless one of the same questions is there."""
    record = result.output.parent / _EVALUATED
    print_ = hashlib.sha256(json.dumps([asdict(asked), max_length]).encode() + test.read_bytes()).hexdigest()
    # What somebody else evaluated in the export since is not what is asked for here.
    if read_json(record) == {"asked": print_, "found": _found(result.output)}:
        return
    pairs = PairsConfig(file=str(test), max_new_tokens=asked.max_new_tokens, max_length=max_length)
    config = EvaluateConfig(
        str(result.output), TasksConfig(names=[]), pairs, batch_size=asked.batch_size, seed=asked.seed
    )
    found: dict[str, Any] = evaluate(config)["preferences"]
    record.write_text(json.dumps({"asked": print_, "found": _found(result.output)}) + "\n", encoding="utf-8")
    logger.info("%-13s evaluated on %d pairs", name, found["n"])


def _found(export: Path) -> str:
    """A hash of what is known of the preferences of an export."""
    preferences = read_json(export / EVALUATION).get("preferences")
    return hashlib.sha256(json.dumps(preferences, sort_keys=True).encode()).hexdigest()
