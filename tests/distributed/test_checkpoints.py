"""Checkpoints: a run that is cut off goes on bit for bit, in any layout, and any layout exports the same bytes."""

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.pipeline.export import ExportConfig, export
from tests.distributed.conftest import Launches
from tests.distributed.results import Observed, distance, exported, metric_distance, read
from tests.distributed.resume_jobs import CHECKPOINT, CONTINUED, CUT, STEPS, STORED
from tests.distributed.world import TOLERANCE

_TIMES = ("step_seconds", "tokens_per_second", "data_wait_seconds", "data_wait_share")
AGAIN = [(source, target) for cases in CONTINUED.values() for source, target, _ in cases if target.endswith("again")]
ELSEWHERE = [(source, target) for cases in CONTINUED.values() for source, target, _ in cases if "-at-" in target]


@pytest.fixture(scope="module")
def resume(launches: Launches) -> Path:
    """The folder of the runs that were cut off and went on."""
    for processes in CONTINUED:
        launches.run_continued(processes)
    return launches.home / "resume"


def _steps(observed: Observed) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in observed.metrics]


@pytest.mark.parametrize("name", [name for names in CUT.values() for name in names])
def test_a_run_that_is_cut_off_leaves_one_whole_checkpoint_and_nothing_else(name: str, resume: Path) -> None:
    checkpoints = resume / f"{name}-cut" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", f"step-{CHECKPOINT:08d}"]
    assert find_checkpoints(checkpoints)


def test_replicas_share_the_writing_of_a_checkpoint(resume: Path) -> None:
    checkpoint = resume / "dp2-whole" / "checkpoints" / f"step-{STEPS:08d}"
    written = [sum(path.stat().st_size for path in checkpoint.glob(f"__{rank}_*.distcp")) for rank in range(2)]
    assert min(written) > max(written) / 2


@pytest.mark.parametrize(("source", "target"), AGAIN)
def test_resume_continues_bit_for_bit(source: str, target: str, resume: Path) -> None:
    whole, again = read(resume / f"{source}-whole"), read(resume / target)
    assert len(whole.metrics) == STEPS
    assert _steps(again) == _steps(whole)
    assert _same_files(resume / target / "export", resume / f"{source}-whole" / "export")


@pytest.mark.parametrize(("source", "target"), AGAIN)
def test_resume_goes_on_with_the_pairs_that_come_next(source: str, target: str, resume: Path) -> None:
    whole, again = read(resume / f"{source}-whole"), read(resume / target)
    assert again.microbatches == [steps[CHECKPOINT:] for steps in whole.microbatches]
    assert all(len(steps) == STEPS for steps in whole.microbatches)


@pytest.mark.parametrize(("source", "target"), AGAIN + ELSEWHERE)
def test_weights_are_equal_bit_for_bit_after_load(source: str, target: str, resume: Path, tmp_path: Path) -> None:
    checkpoint = resume / f"{source}-cut" / "checkpoints" / f"step-{CHECKPOINT:08d}"
    export(ExportConfig(str(checkpoint), str(resume.parent / "student"), str(tmp_path / "export")))
    saved, loaded = exported(tmp_path / "export"), read(resume / target).weights[0]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize(("source", "target"), ELSEWHERE)
def test_a_checkpoint_goes_on_in_another_layout(source: str, target: str, resume: Path) -> None:
    whole, elsewhere = read(resume / "one-whole"), read(resume / target)
    steps, expected = _steps(elsewhere), _steps(whole)
    # Counts of weights by size: one that rounds to the other side of an edge is counted there.
    assert [row.pop("weights", None) is None for row in steps] == [row.pop("weights", None) is None for row in expected]
    # Each is off by rounding.
    assert metric_distance(steps, expected) < 2 * TOLERANCE
    # Weights after more steps of AdamW: its moments were carried over, too.
    assert distance(*(exported(resume / name / "export") for name in (target, "one-whole"))) < 2 * TOLERANCE


@pytest.mark.parametrize("policy", ["student", "teacher"])
def test_every_layout_exports_the_same_bytes(policy: str, launches: Launches) -> None:
    for processes in STORED:
        launches.run_layouts(processes)
    layouts = [layout for names in STORED.values() for layout in names]
    folders = [launches.home / "stored" / f"{layout}-{policy}" / "export" for layout in layouts]
    assert all(_same_files(folder, folders[0]) for folder in folders)
    read_in, written = load_file(launches.home / policy / "model.safetensors"), exported(folders[0])
    assert read_in.keys() == written.keys()
    assert all(torch.equal(read_in[name], written[name]) for name in read_in)


def _same_files(first: Path, second: Path) -> bool:
    """Equal but for the card, which names the run and its layout."""
    card = {"README.md", "ctpd_nemo.json"}
    names = sorted(path.name for path in first.iterdir())
    assert {"model.safetensors", *card} <= set(names)
    assert names == sorted(path.name for path in second.iterdir())
    names = [name for name in names if name not in card]
    same, different, failed = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not different, different
    assert not failed, failed
    return sorted(same) == names
