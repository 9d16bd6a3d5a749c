"""The planner's figures against real steps: storages, operations and bytes counted in one process and in two."""

import json
from typing import Any

import pytest

from tests.forks.client import ROOT, run_forked
from tests.planner.conftest import benchmark

BENCHMARK = benchmark("planner_memory")
NAMES = {
    1: ("one, bf16, frozen", "one, query and key norms", "one, narrow, full", "one, wide, selective, bf16"),
    2: (
        "TP2, wide, selective",
        "TP2 SP, full, bf16",
        "TP2 SP, query and key norms, bf16",
        "PP2, tied, frozen",
        "PP2 of 2 virtual stages",
        "CP2, selective, bf16",
        "DP2, bf16",
        "DP2, narrow, unsharded optimizer",
    ),
}


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A row for every case and rank; the cases of as many processes share one job, in forks."""
    cases = [case for case in BENCHMARK.CASES[request.param] if case["name"] in NAMES[request.param]]
    assert len(cases) == len(NAMES[request.param])
    folder = tmp_path_factory.mktemp("measured")

    def run_cases(processes: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        file = folder / "cases.json"
        file.write_text(json.dumps(cases), encoding="utf-8")
        worker = str(ROOT / "benchmarks/planner_worker.py")
        done = run_forked(folder, processes, program=worker, arguments=[str(file), str(folder)])
        assert done.status == 0, done.stderr
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BENCHMARK, "run_cases", run_cases)
        return BENCHMARK.compare(request.param, cases)


def test_memory_is_within_a_tenth_by_kind(rows: list[dict[str, Any]]) -> None:
    errors = {
        (row["case"], row["measured"]["rank"], kind): error
        for row in rows
        for kind in BENCHMARK.KINDS
        if (error := BENCHMARK.error(row, kind)) is not None
    }
    assert {kind for *_, kind in errors} == set(BENCHMARK.KINDS)
    assert {key: error for key, error in errors.items() if abs(error) > 0.1} == {}


def test_weights_and_gradients_are_exact(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for kind in ("weights", "gradients", "frozen"):
            assert row["predicted"][kind] == row["measured"][kind], (row["case"], kind)


def test_operations_are_those_that_torch_counts(rows: list[dict[str, Any]]) -> None:
    assert {row["case"]: row["predicted"]["flops"] for row in rows} == {
        row["case"]: row["measured"]["flops"] for row in rows
    }


def test_collectives_carry_the_predicted_bytes(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for what in ("bytes", "calls"):
            assert BENCHMARK.counted(row, what) == row["predicted"][what], (row["case"], row["measured"]["rank"])
