"""Checkpoints of a stranger start no process, call no host and write nothing outside of a run, whatever they hold."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.jobs import tensors
from tests.hostile.checkpoints.conftest import LAST, Answer, Watch
from tests.hostile.checkpoints.family import REFUSED, Attack
from tests.hostile.checkpoints.of_archives import archive_attacks
from tests.hostile.checkpoints.of_folders import folder_attacks
from tests.hostile.checkpoints.of_indexes import index_attacks, index_lies
from tests.hostile.checkpoints.of_pickles import all_calls, all_handmade, calls, handmade, names_with_dots

# Beyond what the same job takes for itself on a checkpoint that nobody touched: bytes, seconds of the processor.
MEMORY, SECONDS = 512 * 2**20, 30.0


def _by_name(*families: Iterable[Attack]) -> dict[str, Attack]:
    return {attack.name: attack for family in families for attack in family}


def _some(family: Iterable[Attack], step: int) -> Iterable[Attack]:
    return list(family)[::step]


EVERY = _by_name(
    *(all_calls(), all_handmade(), index_lies(), index_attacks(), archive_attacks(), folder_attacks()),
)
SOME = _by_name(
    *(_some(calls(), 2), _some(handmade(), 2), names_with_dots(), index_attacks()),
    *(_some(index_lies(), 3), _some(archive_attacks(), 6), _some(folder_attacks(), 3)),
)
REST = [attack for name, attack in EVERY.items() if name not in SOME]


@pytest.fixture(scope="module")
def harmless(watched: Watch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    """What is seen of a checkpoint that nobody touched, and the folder it leaves."""
    folder = tmp_path_factory.mktemp("harmless")
    return watched(None, folder=folder), folder / "case"


def _is_record(event: str) -> bool:
    """Whether it is how a job finds its commit and host, before it reads any checkpoint."""
    return event.startswith("subprocess.Popen ['git', ") or event == "socket.gethostname"


def _weights(case: Path) -> bytes:
    return (case / "export/model.safetensors").read_bytes()


def test_a_checkpoint_that_nobody_touched_is_resumed_and_exported(harmless: Any, whole_run: Path) -> None:
    """Bit for bit; what is seen meanwhile is what may be seen of any."""
    seen, case = harmless
    for job in ("exported", "resumed"):
        assert (seen[job]["kind"], seen[job]["said"]) == ("", "")
    assert seen["exported"]["events"] == []
    assert {event for event in seen["resumed"]["events"] if not _is_record(event)} <= {"os.fork"}
    found, expected = (tensors(run_dir / LAST) for run_dir in (case / "run", whole_run))
    assert found.keys() == expected.keys()
    assert len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)


def _check(attack: Attack, watched: Watch, harmless: tuple[Answer, Path], folder: Path) -> None:
    answer = watched(attack, folder=folder)
    for job, outcome in (("exported", attack.exported), ("resumed", attack.resumed)):
        seen, usual = answer[job], harmless[0][job]
        events = usual["events"] if outcome != REFUSED else filter(_is_record, usual["events"])
        assert set(seen["events"]) - set(events) == set(), job
        assert seen["kind"] == ("InputError" if outcome == REFUSED else ""), f"{job}: {seen['said']}"
        assert seen["said"].isprintable()
        assert seen["memory"] < usual["memory"] + MEMORY, job
        assert seen["seconds"] < usual["seconds"] + SECONDS, job
    if attack.exported != REFUSED:
        assert _weights(folder / "case") == _weights(harmless[1]), "not silently others"


@pytest.mark.parametrize("attack", SOME.values(), ids=lambda attack: attack.name)
def test_an_attack_ends_in_one_line_and_does_nothing(
    attack: Attack, watched: Watch, harmless: tuple[Answer, Path], tmp_path: Path
) -> None:
    _check(attack, watched, harmless, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("attack", REST, ids=lambda attack: attack.name)
def test_every_attack_ends_in_one_line_and_does_nothing(
    attack: Attack, watched: Watch, harmless: tuple[Answer, Path], tmp_path: Path
) -> None:
    _check(attack, watched, harmless, tmp_path)


def _is_seen(attack: Attack, watched: Watch) -> bool:
    return bool(watched(attack, freely=True)["freely"]["events"])


def test_readers_that_load_what_they_find_are_seen_to_be_overcome(watched: Watch) -> None:
    """What shows that the watch sees attacks, and that these are some."""
    assert not _is_seen(Attack("none", lambda folder, canary: None), watched)
    firing = [attack for attack in SOME.values() if attack.fires]
    assert len(firing) >= 40
    assert [attack.name for attack in firing if not _is_seen(attack, watched)] == []


@pytest.mark.slow
def test_readers_that_load_what_they_find_are_seen_to_be_overcome_by_all(watched: Watch) -> None:
    assert [attack.name for attack in REST if attack.fires and not _is_seen(attack, watched)] == []


def test_there_are_many_attacks_of_each_kind() -> None:
    assert len(SOME) >= 120
    assert len(EVERY) >= 1_000
