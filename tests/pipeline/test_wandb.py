"""Weights & Biases: what it lacks is told in one line before there is a model, and nobody is asked for anything."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig, TrainerConfig
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.pipeline.wandb_run import check_wandb
from tests.pipeline.recipe import SMALL_BATCHES, composed, recipe, small_job, small_world

wandb = pytest.importorskip("wandb")

KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("wandb") / "world")


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user of whom Weights & Biases knows nothing, and a service that is not there.

    Each test has a service of its own: a key that was found once is kept for as long as the process lives.
    """
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{uuid.uuid4().hex}.invalid")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(home)
    # It reads the environment once and for all.
    wandb.teardown()
    yield home
    wandb.teardown()


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that builds a model has gone too far."""
    for place in ("ctpd_nemo.models.base.build_gpt", "ctpd_nemo.models.teacher.build_gpt"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("a model is built"))


def asks_for(project: bool | str) -> RunConfig:
    return RunConfig(method=None, trainer=TrainerConfig(wandb=project))


def _train(world: TinyWorld, run_dir: Path) -> None:
    train(run_config(composed("train", small_job(world, run_dir, "sft", "trainer.wandb=true"))))


def _score(world: TinyWorld, run_dir: Path) -> None:
    models = [f"model.student.path={world.student}", f"model.teacher.path={world.teacher}"]
    method = [f"method.cache={run_dir / 'cache'}", f"method.reference={world.teacher}"]
    data = [f"data.train=[{world.train}]", f"run_dir={run_dir}", "trainer.wandb=true"]
    score(run_config(composed("score", [*models, *method, *data, *SMALL_BATCHES])))


def _last_stage(world: TinyWorld, run_dir: Path) -> None:
    run_pipeline(composed("pipeline", [*recipe(world, run_dir), "+stages.ctpd.trainer.wandb=true"]))


@pytest.mark.parametrize("job", [_train, _score, _last_stage])
def test_without_a_key_a_job_is_refused_before_there_is_a_model(
    job: Callable[[TinyWorld, Path], None], world: TinyWorld, no_model: None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(InputError) as error:
        job(world, run_dir)
    assert error.value.place == "trainer.wandb"
    assert str(error.value).isprintable()
    assert "WANDB_MODE=offline" in str(error.value)
    assert "wandb login" in str(error.value)
    assert not run_dir.exists()


def test_a_key_from_anywhere_is_one(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("WANDB_API_KEY", KEY)
        check_wandb(asks_for(True))
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "http://another.invalid")
    (nobody / ".netrc").write_text(f"machine another.invalid\n  login user\n  password {KEY}\n")
    (nobody / ".netrc").chmod(0o600)
    check_wandb(asks_for(True))


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_a_run_that_stays_here_needs_no_key(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_wandb(asks_for("a-project"))


def test_what_wandb_offline_has_left_holds(nobody: Path) -> None:
    (nobody / "wandb").mkdir()
    (nobody / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_wandb(asks_for(True))


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [("WANDB_API_KEY", "short", "40+ characters"), ("WANDB_MODE", "nonsense", "mode"), ("WANDB_MODE", "", "mode")],
)
def test_settings_that_cannot_be_used_are_one_line(
    name: str, value: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^trainer\.wandb: found Weights & Biases that cannot be used") as error:
        check_wandb(asks_for(True))
    assert found in str(error.value)
    assert "WANDB_MODE=offline" in error.value.expected


@pytest.mark.parametrize("project", ["a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "x" * 129])
def test_a_project_that_the_service_does_not_take_is_named(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match=r"^trainer\.wandb: found .*; expected true, or a project's name"):
        check_wandb(asks_for(project))


def test_ranks_that_do_not_log_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    check_wandb(asks_for(True))


def test_a_service_that_does_not_answer_is_told_before_there_is_a_model(
    world: TinyWorld, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(InputError) as error:
        train(run_config(composed("train", small_job(world, tmp_path / "run", "sft", "trainer.wandb=true"))))
    assert str(error.value) == (
        "trainer.wandb: found Weights & Biases that cannot be used (CommError: Run initialization has timed out after "
        "90.0 sec.); expected a run that can begin; or WANDB_MODE=offline, or trainer.wandb=false"
    )
