"""Every broken input ends a tool with one line and status 2, before any work; bad rows can be skipped and counted."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from ctpd_nemo.data import template_sandbox
from ctpd_nemo.pipeline import entry
from tests.hostile.case import BORDERS, Case, Scene
from tests.hostile.corpus import CASES
from tests.tools.refusal import content, values

# Tools whose values are those of a run.
JOBS = ("train", "score")
TOOLS = Path(__file__).resolve().parents[2] / "tools"


def task(tool: str) -> entry.Task:
    """What a tool does once Hydra has composed its config."""
    spec = importlib.util.spec_from_file_location(tool, TOOLS / f"{tool}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main.__wrapped__


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    """Of the ranks of a job one speaks; here many jobs follow each other in one process."""
    monkeypatch.chdir(elsewhere)
    if dist.is_initialized():
        dist.distributed_c10d._get_default_store().delete_key("stopped by bad input")
    monkeypatch.setitem(template_sandbox.render_template.__kwdefaults__, "seconds", 0.3)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may get as far as a trainer, from where models are built and weights are read."""
    for module in ("train", "score"):
        monkeypatch.setattr(f"ctpd_nemo.pipeline.{module}.build_trainer", _fail)


def _fail(*args: Any) -> None:
    pytest.fail("the job began to work")


def test_the_corpus_is_large_and_covers_every_border() -> None:
    borders = Counter(case.border for case in CASES)
    assert set(borders) == set(BORDERS)
    assert len(CASES) >= 200
    assert len({(case.border, case.name) for case in CASES}) == len(CASES)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.border}-{case.name}".replace(" ", "_"))
def test_broken_input_is_one_line_and_status_2(
    case: Case, scene: Scene, run_dir: Path, elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = case.build(scene)
    given = changed.pop("run_dir", str(run_dir))
    if case.tool in JOBS:
        config = values(scene.world, run_dir, **changed)
        config.run_dir = given
    else:
        config = OmegaConf.create(changed)
    before = content(run_dir)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        entry.run(task(case.tool), config)
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    place, _, rest = line.partition(": found ")
    found, _, expected = rest.rpartition("; expected ")
    assert place.startswith("error: ")
    assert case.place in place
    assert case.found in found
    assert case.expected in expected
    assert line.isprintable()
    assert content(run_dir) == before
    assert list(elsewhere.iterdir()) == []
