"""A benchmark as its users run it, at toy size."""

import json
import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.forks.client import ROOT, run_forked

BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(name: str, folder: Path, *options: object) -> dict[str, Any]:
    """The JSON report of a benchmark that ran in ``folder``; its tables must have gone to standard output as well."""
    arguments = [name, *map(str, options), "--json", "out.json", "--markdown", "out.md"]
    done = run_forked(folder, function=f"{__name__}:run_as_main", arguments=arguments)
    assert done.status == 0, done.stderr
    assert done.stdout.strip() == (folder / "out.md").read_text(encoding="utf-8").strip()
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def run_as_main(rank: int, name: str, *options: str) -> None:
    """In a fork; processes that the benchmark starts for their memory of their own are forks as well."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment, misc, return-value]
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = [str(BENCHMARKS / name), *options]
    runpy.run_path(sys.argv[0], run_name="__main__")
