"""The recipe on a tiny world in a few steps."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld, build_tiny_world
from ctpd_nemo.pipeline.tiny_world.models import ModelSize

SMALL_BATCHES = [
    "precision=fp32",
    "data.max_length=128",
    "data.microbatch_tokens=256",
    "data.global_batch_size=8",
    "data.num_workers=0",
]
CONF = Path(__file__).resolve().parents[2] / "conf"


def small_world(folder: Path) -> TinyWorld:
    """24 pairs; a teacher and a student of two layers, which two pipeline stages or two tensor ranks can share."""
    teacher, student = ModelSize(2, 32, 48), ModelSize(2, 24, 40)
    return build_tiny_world(folder, n_train=24, n_test=4, teacher=teacher, student=student)


def small_job(world: TinyWorld, run_dir: Path, method: str, *more: str) -> list[str]:
    """Overrides of ``conf/train.yaml``: the student trained on the world's pairs."""
    return [
        f"method={method}",
        f"model.student.path={world.student}",
        f"data.train=[{world.train}]",
        f"run_dir={run_dir}",
        *SMALL_BATCHES,
        *more,
    ]


def recipe(world: TinyWorld, run_dir: Path) -> list[str]:
    """Overrides of ``conf/pipeline.yaml``: all seven stages, three steps each, several microbatches a step."""
    return [
        f"model.teacher.path={world.teacher}",
        f"model.student.path={world.student}",
        f"data.train=[{world.train}]",
        f"run_dir={run_dir}",
        *SMALL_BATCHES,
        *(f"stages.{name}.optim.lr=2e-3" for name in ("sft_teacher", "sft_student")),
        *(f"stages.{name}.optim.lr=5e-4" for name in ("dpo_positive", "dpo_negative", "ctpd")),
        # Adam divides by the gradient's size: what is rounding alone would be blown up where a smaller epsilon let it.
        "optim.eps=1e-4",
        "stages.dpo_student={method:{name:dpo,beta:0.1},optim:{lr:5e-4}}",
        "+stages.ctpd.trainer={checkpoint_every:1,keep_last:3}",
        "+stages.score.method.pairs_per_shard=10",
    ]


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of ``conf/<name>.yaml`` and a command line."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, overrides=list(overrides))
