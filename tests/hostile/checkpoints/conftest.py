"""A run to attack, and a process that goes on with it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.parallel.checkpoint_files import write_manifest
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.hostile.checkpoints.family import Attack
from tests.hostile.checkpoints.run import job

ROOT = Path(__file__).resolve().parents[3]
FIRST, LAST = "checkpoints/step-00000001", "checkpoints/step-00000002"
# What lies where a pickle that imports would look.
PLANTED = """
import os
os.makedirs(os.path.join(os.path.dirname(__file__), "evil-was-here"), exist_ok=True)
class Made:
    def __new__(cls, path, **more):
        os.mkdir(path)
class Built:
    def __setstate__(self, path):
        os.mkdir(path)
"""

Answer = dict[str, dict[str, Any]]
Watch = Callable[..., Answer]


@pytest.fixture(scope="package")
def whole_run(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("attacked") / "run"
    train(run_config(job(world.student.parent, folder)))
    return folder


@pytest.fixture(scope="package")
def child() -> Iterator[Callable[[dict[str, Any]], Answer]]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            **{"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"},
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(case: dict[str, Any]) -> Answer:
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    assert json.loads(process.stdout.readline()) == "ready"
    yield ask
    process.kill()
    process.wait()


@pytest.fixture(scope="package")
def watched(
    whole_run: Path,
    world: TinyWorld,
    child: Callable[[dict[str, Any]], Answer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Watch:
    """What is seen of an attack, and of none; a folder ``case`` in ``folder`` is left."""

    def watch(attack: Attack | None, freely: bool = False, folder: Path | None = None) -> Answer:
        folder = folder or tmp_path_factory.mktemp("attack")
        run_dir, canary = folder / "case/run", folder / "evil-was-here"
        shutil.copytree(whole_run, run_dir, ignore=shutil.ignore_patterns(Path(LAST).name, "logs"))
        (folder / "planted.py").write_text(PLANTED)
        if attack is not None:
            attack.edit(run_dir / FIRST, canary)
            if attack.fits:
                (run_dir / FIRST / "manifest.json").unlink()
                write_manifest(run_dir / FIRST)
        case = {"folder": str(folder / "case"), "world": str(world.student.parent), "freely": freely}
        answer = child(case)
        if canary.exists():
            for seen in answer.values():
                seen["events"].append("the canary")
        return answer

    return watch
