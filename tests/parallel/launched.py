"""A rank that needs no model: it ends with its launcher, and has forked a process as a dataloader does."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

from ctpd_nemo.parallel.launcher import end_with_launcher


def stay(folder: Path, name: str) -> None:
    """Say who this is, and do nothing."""
    writing = folder / f".{name}"
    writing.write_text(str(os.getpid()))
    writing.rename(folder / name)
    time.sleep(600)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    end_with_launcher()
    rank = os.environ.get("RANK", "0")
    multiprocessing.get_context("fork").Process(target=stay, args=[place, f"child-{rank}"], daemon=True).start()
    stay(place, f"rank-{rank}")
