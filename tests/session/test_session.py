"""What the tests themselves are run by."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.session.groups import FOLDERS, group_of
from tests.session.order import pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import subprocess, sys, threading, time

import pytest


def sleeper(note):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], stderr=open(note, "w"))
    open(f"{note}.pid", "w").write(str(child.pid))
    return child


@pytest.mark.limit(3)
def test_waits_for_a_process(request):
    sleeper(request.config.rootpath / "child").wait()


@pytest.mark.limit(3)
def test_waits_for_a_lock():
    lock_of_the_test = threading.Lock()
    with lock_of_the_test:
        lock_of_the_test.acquire()


@pytest.fixture
def slow_end():
    yield
    time.sleep(3600)


@pytest.mark.limit(3)
def test_waits_at_its_end(slow_end):
    pass


@pytest.mark.limit(3)
def test_swallows_errors():
    while True:
        try:
            time.sleep(3600)
        except Exception:
            pass


def test_takes_a_second():
    busy = "import time\\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of ``TESTS`` and what pytest said of them, with the plugins of the tests here."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = limit(seconds)\n")
    plugins = (f"-ptests.session.{name}" for name in ("cpu_time", "limits", "order"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-pno:cacheprovider", *plugins, "test_some.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CTPD_TESTS_CPU": str(folder / "cpu")},
        capture_output=True,
        text=True,
        check=False,
    )
    return folder, done


def test_a_test_that_hangs_fails_with_all_stacks_and_its_processes_are_ended(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = run
    assert "3 failed, 2 passed, 1 error" in done.stdout, done.stdout
    for name in ("waits_for_a_process", "waits_for_a_lock", "waits_at_its_end", "swallows_errors"):
        assert f"test_some.py::test_{name}: not done after 3 s" in done.stderr
        assert f"in test_{name}" in done.stderr or name == "waits_at_its_end"
    assert "in slow_end" in done.stderr
    assert "test_takes_a_second PASSED" in done.stdout
    # The process printed where it was, too.
    assert 'File "<string>", line 1' in (folder / "child").read_text()
    assert not psutil.pid_exists(int((folder / "child.pid").read_text()))


def test_cpu_time_is_noted_with_that_of_processes(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    (file,) = (run[0] / "cpu").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    parts = {row["part"]: row["seconds"] for row in rows if row["test"].endswith("test_takes_a_second")}
    assert parts.keys() == {"setup", "call", "teardown"}
    assert parts["call"] > 0.9
    assert parts["setup"] < parts["call"]


def test_every_test_runs_once_in_a_random_order_that_its_seed_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = [SimpleNamespace(path=f"test_{file}.py", number=number) for file in range(20) for number in range(20)]

    def order(seed: int) -> list[tuple[str, int]]:
        monkeypatch.setenv("CTPD_TESTS_ORDER", str(seed))
        shuffled = list(tests)
        pytest_collection_modifyitems(shuffled)  # type: ignore[arg-type]
        return [(test.path, test.number) for test in shuffled]

    one, again, two = order(1), order(1), order(2)
    assert one == again != two
    assert sorted(one) == sorted(two) == sorted((test.path, test.number) for test in tests)
    # Files stay together, for what they share.
    assert [path for path, _ in groupby(one, key=lambda test: test[0])] != sorted({path for path, _ in one})
    assert len(list(groupby(one, key=lambda test: test[0]))) == 20


def test_tests_that_share_what_is_costly_are_of_one_group_and_all_others_of_their_file() -> None:
    assert group_of("tests/distributed/test_layouts.py::test_x[a]") == "tests/distributed"
    assert group_of("tests/pipeline/stages/test_single.py::test_x") == "tests/pipeline/stages"
    assert group_of("tests/pipeline/test_train.py::test_x") == "tests/pipeline/test_train.py"
    assert all((ROOT / folder / "conftest.py").exists() for folder in FOLDERS)
