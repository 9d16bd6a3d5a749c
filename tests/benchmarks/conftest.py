"""Benchmarks are scripts in a folder of their own; what they share is imported from there, as they do."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))
