"""The run whose checkpoint is attacked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS = 2
# Ends what a stand-in for a library that decompresses skips.
SKIPPED = b"here begins what is compressed"


def job(world: Path, run_dir: Path) -> Any:
    """Two steps with a checkpoint of each."""
    from tests.tools.refusal import values

    folders: Any = SimpleNamespace(student=world / "student", teacher=world / "teacher", train=world / "train.jsonl")
    return values(folders, run_dir, trainer={"max_steps": STEPS, "checkpoint_every": 1, "keep_last": STEPS})
