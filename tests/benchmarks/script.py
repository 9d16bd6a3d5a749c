"""A benchmark as its users run it, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_benchmark(name: str, folder: Path, *options: object) -> dict[str, Any]:
    """The JSON report of a benchmark that ran in ``folder``; its tables must have gone to standard output as well."""
    command = [sys.executable, str(BENCHMARKS / name), *map(str, options), "--json", "out.json", "--markdown", "out.md"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (folder / "out.md").read_text(encoding="utf-8").strip()
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))
