"""A recipe that ran through, and what is read of the folders that it leaves."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import composed, recipe

# What runs unless it is asked for more, and the DPO baseline.
OF_STUDENT_PAIR = {"dpo_student_positive", "dpo_student_negative", "score_student", "tis_dpo"}
DISTILLATION = {"uld", "dskd", "multilevel_ot"}
ALL = [stage.name for stage in STAGES if stage.name not in OF_STUDENT_PAIR | DISTILLATION]
TRAINED = [name for name in ALL if name != "score"]
STUDENT_ALONE = [f"stages.{name}=null" for name in ALL if name != "sft_student"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A recipe that ran through, never interrupted."""

    world: TinyWorld
    run_dir: Path
    results: dict[str, StageResult]

    def copy(self, folder: Path) -> list[str]:
        """Overrides to run the same again on a copy of what it left."""
        shutil.copytree(self.run_dir, folder)
        return recipe(self.world, folder)


def run(overrides: list[str]) -> dict[str, StageResult]:
    return run_pipeline(composed("pipeline", overrides))


def done_again(results: dict[str, StageResult]) -> list[str]:
    return [name for name, result in results.items() if not result.skipped]


def exported(run_dir: Path, stage: str) -> dict[str, bytes]:
    # The card and its record name the run's own folders.
    files = (
        path for path in (run_dir / stage / "export").iterdir() if path.name not in ("README.md", "ctpd_nemo.json")
    )
    return {path.name: path.read_bytes() for path in files}


def scores(run_dir: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((run_dir / "score/cache").glob("*.parquet"))}


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and name != "data_wait_share"}
        for row in rows
    ]


def cut_off(stage_dir: Path) -> None:
    """Leave a complete stage as one that was killed: nothing says that it is complete, and there is no output."""
    status = stage_dir / "stage.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "complete": False}))
    shutil.rmtree(stage_dir / "export", ignore_errors=True)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
