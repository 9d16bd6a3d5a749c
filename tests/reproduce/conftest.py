"""A world so small that a table of it is a matter of seconds; commands of a cluster."""

from pathlib import Path

import pytest

from ctpd_nemo.pipeline.recipe import STAGES
from tests.docker.stubs import Stubs

_UNTRAINED = ("score", "score_student")


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


@pytest.fixture
def nano() -> list[str]:
    """Overrides of ``conf/reproduce.yaml``: 24 pairs, two steps a stage."""
    size = "{num_layers:1,hidden_size:16,ffn_hidden_size:24}"
    trained = [stage.name for stage in STAGES if stage.name not in _UNTRAINED]
    return [
        *("world.n_train=24", "world.n_test=6", f"world.teacher={size}", f"world.student={size}"),
        *("data.global_batch_size=8", "evaluation.max_new_tokens=4", "+stages.score.method.pairs_per_shard=12"),
        "stages.sft_teacher.data.global_batch_size=8",
        *(f"stages.{name}.trainer.max_steps=2" for name in trained),
    ]
