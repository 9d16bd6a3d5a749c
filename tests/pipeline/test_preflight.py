"""What a job or the last stage of a pipeline will lack is told before the first model is built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import preflight, quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.encode import encode
from ctpd_nemo.pipeline.preflight import check_shared, checkpoint_bytes
from ctpd_nemo.pipeline.quickstart import quickstart
from ctpd_nemo.pipeline.stage_status import STATUS, StageStatus, write_status
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.reproduce.job import reproduce
from tests.pipeline.recipe import composed, recipe, small_job, small_world


class Disk(NamedTuple):
    """As ``shutil.disk_usage`` has it, bytes."""

    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("preflight") / "world")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that builds a model has gone too far."""
    for place in ("ctpd_nemo.models.base.build_gpt", "ctpd_nemo.models.teacher.build_gpt"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("a model is built"))


def run(world: TinyWorld, run_dir: Path, *more: str) -> Path:
    values = ["trainer.max_steps=1", "optim.lr=1e-3", *more]
    return train(run_config(composed("train", small_job(world, run_dir, "sft", *values))))


@pytest.fixture(scope="module")
def trained(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one step."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run(world, run_dir)
    return run_dir


def _broken_pairs(world: TinyWorld, folder: Path) -> None:
    (folder / "broken.jsonl").write_text(world.train.read_text() + '{"prompt": "cut\n')


def _half_a_status(world: TinyWorld, folder: Path) -> None:
    (folder / "run" / "ctpd").mkdir(parents=True)
    (folder / "run" / "ctpd" / STATUS).write_text('{"fingerprint": ')


def _not_done(world: TinyWorld, folder: Path) -> None:
    write_status(folder / "run" / "score", StageStatus("x", complete=False))
    (folder / "run" / "score" / "cache").mkdir()


def _nothing(world: TinyWorld, folder: Path) -> None:
    pass


ONLINE_OT = "stages.multilevel_ot={method:{name:multilevel_ot,reference:online,top_k:100000},optim:{lr:1e-3}}"
# What is said on the command line, where the error is, what it found, and what there is before.
LATE: dict[str, tuple[list[str], str, str, Callable[[TinyWorld, Path], None]]] = {
    "no path of a model": (["model.student.path=null"], "stage sft_student, model.student.path", "nothing", _nothing),
    "no data": (["+stages.ctpd.data.train=[nowhere.jsonl]"], "nowhere.jsonl", "no such", _nothing),
    "a bad row": (["+stages.ctpd.data.train=[broken.jsonl]"], "broken.jsonl:25", "malformed JSON", _broken_pairs),
    "no held-out data": (["+stages.ctpd.data.validation=[no.jsonl]"], "no.jsonl", "no such", _nothing),
    "longer than a model": (
        ["+stages.dpo_student.data.max_length=100000", "+stages.dpo_student.data.microbatch_tokens=400000"],
        "stage dpo_student, data.max_length",
        "100000",
        _nothing,
    ),
    "other spans than the scores have": (
        ["+stages.ctpd.data.max_length=100"],
        "stages.ctpd.data.max_length",
        "100",
        _nothing,
    ),
    "more than a vocabulary": (
        ["stages.score.method.top_k=100000"],
        "stage score, method.top_k",
        "100000",
        _nothing,
    ),
    "more than a vocabulary, beside the student": (
        [ONLINE_OT],
        "stage multilevel_ot, method.top_k",
        "100000",
        _nothing,
    ),
    "no such metric": (
        ["+stages.dpo_student.trainer={keep_best:1,best_by:val_los}", "data.validation=[test.jsonl]"],
        "trainer.best_by",
        "'val_los'",
        lambda world, folder: shutil.copy(world.test, folder / "test.jsonl"),
    ),
    "no template": (["+stages.ctpd.model.teacher.chat_template=no.jinja"], "", "no.jinja", _nothing),
    "no tokenizer": (["+stages.ctpd.model.teacher.tokenizer=no"], "no", "no such folder", _nothing),
    "no cache of one's own": (
        ["+stages.dpo_student.method.reference=cache", "+stages.dpo_student.method.scores=no"],
        "stage dpo_student, no",
        "no manifest.json",
        _nothing,
    ),
    "a model of another vocabulary": (
        ["stages.dpo_positive=null", "stages.ctpd=null", "+stages.score.method.positive=student"],
        "stage score, student",
        "a tokenizer with ids up to",
        lambda world, folder: shutil.copytree(world.student, folder / "student"),
    ),
    "a status that is damaged": ([], "run/ctpd/stage.json", "no JSON", _half_a_status),
    "a stage that is neither asked for nor begun": (
        ["only=[sft_teacher,sft_student,ctpd]"],
        "stages.score",
        "nothing complete in run/score",
        _nothing,
    ),
    "a stage that is neither asked for nor done": (
        ["only=[sft_teacher,sft_student,ctpd]"],
        "stages.score",
        "nothing complete in run/score",
        _not_done,
    ),
}


@pytest.mark.parametrize("why", LATE)
def test_what_a_later_stage_will_lack_is_told_before_the_first_begins(
    why: str, world: TinyWorld, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, place, found, prepare = LATE[why]
    prepare(world, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        run_pipeline(composed("pipeline", [*recipe(world, Path("run")), *overrides]))
    assert error.value.place.startswith(place)
    assert found in error.value.found
    assert str(error.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["stages.ctpd=null"], "stages.ctpd"),
        (["stages.dpo_student=null"], "stages.dpo_student"),
        (["only=[ctpd]"], "only"),
    ],
)
def test_the_quickstart_needs_the_students_that_it_compares(
    overrides: list[str], place: str, no_model: None, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        quickstart(composed("quickstart", [f"run_dir={tmp_path / 'run'}", *overrides]))
    assert error.value.place == place
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("seed=abc", "seed"),
        ("parallel.timeout_minutes=abc", "parallel.timeout_minutes"),
        ("stages.ctpd.method.beta=-1", "method.beta"),
        ("+world.n_trian=3", "world.n_trian"),
        ("world.n_train=abc", "world.n_train"),
        ("only=ctpd", "only"),
        ("only=5", "only"),
    ],
)
@pytest.mark.parametrize("tool", [quickstart, run_pipeline, encode])
def test_a_value_of_another_type_is_told_before_anything_is_made(
    tool: Callable[[Any], Any], override: str, place: str, world: TinyWorld, no_model: None, tmp_path: Path
) -> None:
    if "world" in override and tool is not quickstart:
        return
    models = [] if tool is quickstart else recipe(world, tmp_path / "run")
    with pytest.raises(InputError) as error:
        tool(composed(tool.__name__.removeprefix("run_"), [*models, f"run_dir={tmp_path / 'run'}", override]))
    assert error.value.place.endswith(place)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_another_node_does_not_see_is_told_with_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(preflight.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(preflight, "first_reason", lambda reason: reason)
    monkeypatch.setattr(preflight, "_SIGHT_SECONDS", 0.0)
    check_shared("run_dir", tmp_path)
    with pytest.raises(InputError, match=r"^run_dir: found .*, which is not there for rank 1 on .*; expected .* share"):
        check_shared("run_dir", tmp_path / "of rank 0 alone")


@pytest.mark.parametrize("override", ["batch_size=0", "max_new_tokens=0", "seed=-1"])
def test_a_table_is_not_begun_whose_students_cannot_be_evaluated(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^evaluation\.{override.partition('=')[0]}: found"):
        reproduce(composed("reproduce", [f"run_dir={tmp_path / 'run'}", f"evaluation.{override}"]), "tiny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["optim.lr=1e-2", "data.max_length=120", "seed=7", "method.name=sft"])
def test_a_checkpoint_of_another_run_is_told_before_there_is_a_model(
    change: str, world: TinyWorld, trained: Path, no_model: None
) -> None:
    if change == "method.name=sft":
        # It belongs to the run: the model is built.
        with pytest.raises(pytest.fail.Exception, match="a model is built"):
            run(world, trained, change)
        return
    with pytest.raises(InputError, match="expected what the checkpoint was trained on"):
        run(world, trained, change)


def test_names_of_what_may_differ_are_known_before_anything_differs(
    world: TinyWorld, no_model: None, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^resume\.allow: found 'stepps'; expected names of what may differ: .*steps"):
        run(world, tmp_path / "run", "resume.allow=[steps,stepps]")


def test_a_disk_without_room_for_a_checkpoint_is_told_before_there_is_a_model(
    world: TinyWorld, trained: Path, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is less than a checkpoint takes: nobody is refused who has room."""
    needed = checkpoint_bytes(str(world.student))
    files = (trained / "checkpoints" / "step-00000001").rglob("*")
    assert needed <= sum(path.stat().st_size for path in files)
    disk = Disk(10**9, 10**9 - needed + 1, needed - 1)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(InputError, match=r"^run_dir: found .* GB free on the disk of .*; expected .* GB") as error:
        run(world, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Of all that a pipeline leaves: teachers, students.
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: disk._replace(free=4 * needed))
    with pytest.raises(InputError, match=r"^run_dir: found"):
        run_pipeline(composed("pipeline", recipe(world, tmp_path / "all")))
    assert not (tmp_path / "all").exists()
    # Some file systems do not know.
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Disk(0, 0, 0))
    with pytest.raises(pytest.fail.Exception, match="a model is built"):
        run(world, tmp_path / "run")
    assert "last checkpoint" in error.value.expected


def test_a_job_that_is_done_needs_no_room(world: TinyWorld, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 0))
    assert run(world, trained).name == "step-00000001"
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1


def test_data_that_stages_share_is_opened_once_more_and_not_once_a_stage(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_data(run: Any) -> Any:
        opened.append(run.method.name)
        return plain(run)

    plain = preflight.open_data
    monkeypatch.setattr("ctpd_nemo.pipeline.stage_checks.open_data", open_data)
    monkeypatch.setattr("ctpd_nemo.pipeline.stages.stage_fingerprint", lambda *_: pytest.fail("the first stage"))
    overrides = recipe(world, tmp_path / "run")
    with pytest.raises(pytest.fail.Exception, match="the first stage"):
        run_pipeline(composed("pipeline", overrides))
    assert len(opened) == 1
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    with pytest.raises(pytest.fail.Exception, match="the first stage"):
        run_pipeline(composed("pipeline", [*overrides, f"+stages.sft_teacher.data.train=[{tmp_path / 'own.jsonl'}]"]))
    assert len(opened) == 3
