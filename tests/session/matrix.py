"""The tests under other kernels, threads, load and order: what each run found, and its CPU minutes.

    python -m tests.session.matrix                    # the tests that do arithmetic, under every setting
    python -m tests.session.matrix "oneDNN off"       # under some of them
    python -m tests.session.matrix --whole "random order"    # all tests but the slow ones

A setting is an environment variable of torch or one of its libraries, which then computes as on another processor, or
one of these tests' own. Each is a run of pytest in one process; ends with status 1 where a test has failed.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where numbers are compared with numbers that came about in another way.
ARITHMETIC = (
    "tests/test_rounding.py",
    "tests/losses",
    "tests/models",
    "tests/parallel",
    "tests/convert",
    "tests/distributed",
    "tests/evaluation",
    "tests/benchmarks",
    "tests/planner/test_measured.py",
    "tests/planner/test_distillation.py",
    "tests/pipeline/score_cache",
    "tests/pipeline/stages",
    "tests/pipeline/test_distillation_stages.py",
    "tests/pipeline/test_encode.py",
    "tests/pipeline/test_real_input.py",
    "tests/pipeline/test_recipe.py",
    "tests/pipeline/test_score.py",
    "tests/pipeline/test_top_k_cache.py",
    "tests/pipeline/test_train.py",
)


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        environment: What is set for it, over one thread.
        busy: How many processes do nothing but use a core beside it.
    """

    environment: dict[str, str] = field(default_factory=dict)
    busy: int = 0

    def __str__(self) -> str:
        told = [f"{name}={value}" for name, value in self.environment.items()]
        return ", ".join(told + [f"{self.busy} busy loops"] * bool(self.busy))


SETTINGS = {
    "plain": Setting(),
    "ATen default": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "ATen AVX2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "MKL SSE4.2": Setting({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "MKL AVX2": Setting({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "oneDNN SSE4.1": Setting({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "oneDNN AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "oneDNN off": Setting({"CTPD_TESTS_ONEDNN": "off"}),
    "two threads": Setting({"OMP_NUM_THREADS": "2"}),
    "two busy loops": Setting(busy=2),
    "random order": Setting({"CTPD_TESTS_ORDER": "1"}),
}


@dataclass(frozen=True)
class Outcome:
    """What a run of pytest found: numbers of tests, names of those that failed, and CPU seconds with all it started."""

    passed: int
    skipped: int
    failed: list[str]
    cpu_seconds: float


@contextlib.contextmanager
def _busy(processes: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(setting: Setting, tests: list[str]) -> Outcome:
    """Run some tests under a setting; what pytest prints goes to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **setting.environment}
    with tempfile.TemporaryDirectory() as folder, _busy(setting.busy):
        report, before = Path(folder, "report.xml"), _cpu_seconds()
        command = [sys.executable, "-m", "pytest", "-m", "not slow", f"--junitxml={report}", *tests]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode
        used = _cpu_seconds() - before
        if status not in (0, 1) or not report.exists():
            return Outcome(0, 0, [f"pytest ended with status {status}"], used)
        cases = ET.parse(report).getroot().iter("testcase")
        found = {f"{case.get('classname')}::{case.get('name')}": {part.tag for part in case} for case in cases}
    failed = [name for name, parts in found.items() if parts & {"failure", "error"}]
    skipped = sum("skipped" in parts for parts in found.values())
    return Outcome(len(found) - len(failed) - skipped, skipped, failed, used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="all tests but the slow ones")
    parser.add_argument("names", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - SETTINGS.keys():
        parser.error(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    lines = ["| setting | | passed | failed | skipped | CPU min |", "|---|---|---:|---:|---:|---:|"]
    failures = []
    for name in arguments.names or SETTINGS:
        outcome = run(SETTINGS[name], [] if arguments.whole else list(ARITHMETIC))
        counts = f"{outcome.passed} | {len(outcome.failed)} | {outcome.skipped} | {outcome.cpu_seconds / 60:.1f}"
        lines.append(f"| {name} | {SETTINGS[name]} | {counts} |")
        failures += [f"{name}: {test}" for test in outcome.failed]
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join([*lines, "", *failures]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
