"""A tiny world to run jobs in, and a run folder to lose nothing of."""

from pathlib import Path

import pytest

from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder that somebody cares about."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    (folder / "export").mkdir()
    for name in ("checkpoints/step-00000007/half", "export/model.safetensors", "metrics.jsonl", "config.json", "notes"):
        (folder / name).write_text(f'{{"precious": "{name}"}}\n')
    return folder
