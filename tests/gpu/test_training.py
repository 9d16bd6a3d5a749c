"""Training on one device: CTPD in bf16 and every FP8 recipe, and a recipe cut off and gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.train import train
from tests.gpu.world import MAX_LENGTH

STEPS = 6
# CTPD's loss of a step under FP8, against bf16 on the same pairs.
LOSS_TOLERANCE = 0.05


def values(world: Path, method: dict[str, Any], precision: PrecisionConfig, run_dir: Path) -> Any:
    return run_config(
        OmegaConf.create(
            {
                "run_dir": str(run_dir),
                "method": method,
                "model": {side: {"path": str(world / side)} for side in ("student", "teacher")},
                "precision": vars(precision),
                "data": {
                    "train": [str(world / "pairs.jsonl")],
                    "max_length": MAX_LENGTH,
                    "microbatch_tokens": 1024,
                    "global_batch_size": 8,
                    "num_workers": 1,
                },
                "optim": {"lr": 1e-4, "warmup_fraction": 0.0},
                "trainer": {"epochs": 4, "max_steps": STEPS},
            }
        )
    )


@pytest.fixture(scope="module")
def cache(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the teachers in bf16."""
    folder = tmp_path_factory.mktemp("cache") / "scores"
    models = {"reference": world / "teacher", "positive": world / "positive", "negative": world / "negative"}
    method = {"name": "score", "cache": str(folder), **{role: str(path) for role, path in models.items()}}
    return score(values(world, method, PrecisionConfig(), folder.parent))


def losses(run: Any) -> list[float]:
    train(run)
    rows = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def in_bf16(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    method = {"name": "ctpd", "beta": 0.02, "scores": str(cache), "scoring_precision": "bf16"}
    return losses(values(world, method, PrecisionConfig(), tmp_path_factory.mktemp("bf16")))


def test_ctpd_learns(in_bf16: list[float]) -> None:
    """The second time that it sees the same pairs, half of the steps, it does better on them."""
    assert len(in_bf16) == STEPS
    assert sum(in_bf16[STEPS // 2 :]) < sum(in_bf16[: STEPS // 2])


def test_ctpd_under_fp8_follows_bf16(
    world: Path, cache: Path, in_bf16: list[float], fp8: PrecisionConfig, tmp_path: Path
) -> None:
    method = {"name": "ctpd", "beta": 0.02, "scores": str(cache), "scoring_precision": "bf16"}
    found = losses(values(world, method, fp8, tmp_path))
    assert found == pytest.approx(in_bf16, abs=LOSS_TOLERANCE)


def test_teachers_beside_the_student_give_the_cached_loss(world: Path, in_bf16: list[float], tmp_path: Path) -> None:
    pair = {role: str(world / role) for role in ("positive", "negative")}
    found = losses(
        values(world, {"name": "ctpd", "beta": 0.02, "reference": "online", **pair}, PrecisionConfig(), tmp_path)
    )
    assert found == pytest.approx(in_bf16, abs=LOSS_TOLERANCE / 5)
