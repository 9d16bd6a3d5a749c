"""Run folders of a stranger, in which something else has the name of a file that jobs write or read."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.pipeline.claim import claim
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.origin import read_starts
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.report.metric_log import read_metrics
from ctpd_nemo.report.run_page import RunPageConfig, write_run_page
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_job

OWN = "what its user holds dear\n"
# In place of a file: a pipe and a device, and links that lead out of the folder, nowhere, and in a circle.
STAND_INS: dict[str, Callable[[Path, Path], object]] = {
    "a pipe": lambda path, own: os.mkfifo(path),
    "a device": lambda path, own: path.symlink_to("/dev/zero"),
    "a link to a file": lambda path, own: path.symlink_to(own),
    "a link to no file yet": lambda path, own: path.symlink_to(own.with_name("new")),
    "a circle": lambda path, own: path.symlink_to(path.name),
}
# By whom: jobs, NeMo and Lightning. Some are there while a job is at work, or after a fault of it, alone.
WRITTEN = (
    *("metrics.jsonl", "starts.jsonl", "config.json", "origin.json", "heartbeat.json", ".heartbeat.json.writing"),
    *("bad_batches.jsonl", "probe.json", "stage.json", "logs/hparams.yaml", "logs/error-rank-0.txt"),
    *("logs/cmd-args.log", "logs/git-info.log", "logs/lightning_logs.txt", "logs/nemo_error_log.txt"),
)


@pytest.fixture(scope="module")
def training(world: TinyWorld) -> RunConfig:
    return run_config(composed("train", small_job(world, Path("run"), "sft", "trainer.max_steps=1")))


@pytest.fixture(scope="module")
def scoring(world: TinyWorld) -> RunConfig:
    values = [f"model.teacher.path={world.teacher}", f"method.reference={world.teacher}", "method.cache=cache"]
    values += [f"model.student.path={world.student}", f"data.train={world.train}", *SMALL_BATCHES]
    return run_config(composed("score", values))


@pytest.fixture(scope="module")
def finished(training: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(replace(training, run_dir=str(folder)))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of whoever takes the folder."""
    path = tmp_path / "home" / "own"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def stand_in(finished: Path, run_dir: Path, name: str, kind: str, own: Path) -> Path:
    shutil.copytree(finished, run_dir)
    path = run_dir / name
    path.unlink(missing_ok=True)
    STAND_INS[kind](path, own)
    return path


@pytest.mark.parametrize("kind", STAND_INS)
def test_no_job_goes_on_where_something_else_is_in_place_of_a_file_that_it_writes(
    kind: str,
    training: RunConfig,
    scoring: RunConfig,
    finished: Path,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits at no pipe, and writes to no file beyond its folder."""
    monkeypatch.setattr("ctpd_nemo.pipeline.train.open_data", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr("ctpd_nemo.pipeline.score.open_data", lambda *_: pytest.fail("it began"))
    for number, name in enumerate(WRITTEN):
        run_dir = tmp_path / str(number) / "run"
        path = stand_in(finished, run_dir, name, kind, own)
        for job, run in ((train, training), (score, scoring)):
            with pytest.raises(InputError) as error:
                job(replace(run, run_dir=str(run_dir)))
            assert error.value.place == str(path)
            assert str(error.value).isprintable()
    assert own.read_text() == OWN
    assert [one.name for one in own.parent.iterdir()] == [own.name]


def page_error(run_dir: Path) -> InputError | None:
    """What keeps a run from having a page."""
    try:
        write_run_page(RunPageConfig(run_dir=str(run_dir)))
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a circle"])
def test_a_page_of_a_run_waits_for_no_pipe_and_reads_no_device(
    kind: str, finished: Path, own: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(WRITTEN):
        run_dir = tmp_path / str(number) / "run"
        path = stand_in(finished, run_dir, name, kind, own)
        said = page_error(run_dir)
        assert said is None or (str(path) in said.place and str(said).isprintable())


@pytest.mark.parametrize("name", ["metrics.jsonl", "starts.jsonl"])
def test_a_log_of_holes_fills_no_memory(name: str, finished: Path, tmp_path: Path) -> None:
    """A file of a terabyte that takes no room on its disk is refused; a row without end is none."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    whole = (run_dir / name).read_text()
    with (run_dir / name).open("a") as file:
        file.truncate(len(whole) + 40 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write("\n" + whole)
    assert len(read_starts(run_dir)) == (2 if name == "starts.jsonl" else 1)
    write_run_page(RunPageConfig(run_dir=str(run_dir)))
    os.truncate(run_dir / name, 2**40)
    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes"):
        read_starts(run_dir) if name == "starts.jsonl" else read_metrics(run_dir / name)


def test_a_run_goes_on_whose_folders_are_on_other_disks(training: RunConfig, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for name in ("logs", "checkpoints"):
        (run_dir / name).rename(tmp_path / name)
        (run_dir / name).symlink_to(tmp_path / name)
    assert train(replace(training, run_dir=str(run_dir))) == run_dir / "checkpoints" / "step-00000001"


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_lock_that_is_none_is_neither_waited_for_nor_written_through(kind: str, own: Path, tmp_path: Path) -> None:
    STAND_INS[kind](tmp_path / ".run.lock", own)
    with pytest.raises(OSError, match=r"\.run\.lock"):
        claim(tmp_path / "run")
    assert own.read_text() == OWN
    assert [one.name for one in own.parent.iterdir()] == [own.name]
