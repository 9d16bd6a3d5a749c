"""One world, and one run that was never disturbed, for all tests of checkpoints."""

from pathlib import Path

import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.checkpointing.runs import run, sft
from tests.pipeline.recipe import small_world


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("checkpointing") / "world")


@pytest.fixture(scope="package")
def whole(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that was never disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(sft(world, run_dir))
    return run_dir
