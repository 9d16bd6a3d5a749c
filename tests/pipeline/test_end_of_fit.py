"""The end of a job: the model stays where it is until it is gone, and then it is gone."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from megatron.core.models.gpt import GPTModel

from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.stages import let_go
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_job, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("end") / "world")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that move a whole module, and of a tensor to the host."""
    calls: list[str] = []

    def counting(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            calls.append(f"{type(self).__name__}.{name}")
            return plain(self, *arguments, **named)

        monkeypatch.setattr(owner, name, call)

    for name in ("cpu", "to", "cuda", "_apply"):
        counting(torch.nn.Module, name)
    return calls


class Ended(Callback):
    """What has moved before the end began, and what there is of the model."""

    def __init__(self, moved: list[str]) -> None:
        self.moved = moved
        self.before = -1
        self.models: list[weakref.ref[GPTModel]] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.before = len(self.moved)
        self.models = [weakref.ref(part) for part in pl_module.modules() if isinstance(part, GPTModel)]


def test_training_ends_without_a_copy_of_the_model_and_leaves_none(
    world: TinyWorld, moved: list[str], tmp_path: Path
) -> None:
    """Lightning would copy it to the host: 16 GB a rank for 8B, on a node that has no use for them."""
    ended = Ended(moved)
    train(run_config(composed("train", small_job(world, tmp_path / "run", "sft", "trainer.max_steps=1"))), [ended])
    assert ended.before >= 0
    assert moved[ended.before :] == []
    models = ended.models
    assert models
    # Lightning gives callbacks methods of the model.
    del ended
    let_go()
    assert [model for model in models if model() is not None] == []


def test_scoring_ends_without_a_copy_of_the_models(world: TinyWorld, moved: list[str], tmp_path: Path) -> None:
    models = [f"model.student.path={world.student}", f"model.teacher.path={world.teacher}"]
    method = [f"method.cache={tmp_path / 'cache'}", f"method.reference={world.teacher}"]
    folders = [f"data.train=[{world.train}]", f"run_dir={tmp_path / 'run'}"]
    score(run_config(composed("score", [*models, *method, *folders, *SMALL_BATCHES])))
    assert not [call for call in moved if call.endswith((".cpu", "._apply")) and call.startswith("Scorer")]
