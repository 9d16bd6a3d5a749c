"""A tiny world with everything in it that a case may break a copy of, made once."""

from pathlib import Path

import pytest

from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.hostile.case import Scene
from tests.pipeline.recipe import small_world
from tests.tools.refusal import values

ROLES = ("reference", "positive", "negative")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("hostile") / "world")


@pytest.fixture(scope="session")
def whole(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The things themselves; their folders are not to be changed."""
    home = tmp_path_factory.mktemp("whole")
    roles = dict.fromkeys(ROLES, str(world.teacher))
    method = {"name": "score", "cache": str(home / "cache"), "pairs_per_shard": 10, **roles}
    score(run_config(values(world, home / "run", method=method)))
    data = {"encoded": str(home / "encoded")}
    checkpoint = train(run_config(values(world, home / "sft", data=data, trainer={"max_steps": 1})))
    return Scene(world, home, home / "cache", home / "encoded", checkpoint)


@pytest.fixture
def scene(whole: Scene, tmp_path: Path) -> Scene:
    """The same, with a folder for a case of its own."""
    folder = tmp_path / "case"
    folder.mkdir()
    return Scene(whole.world, folder, whole.cache, whole.encoded, whole.checkpoint)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder that somebody cares about."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    for name in ("checkpoints/step-00000007/half", "metrics.jsonl", "config.json", "notes"):
        (folder / name).write_text(f'{{"precious": "{name}"}}\n')
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Where one stands: nothing is to appear there."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder
