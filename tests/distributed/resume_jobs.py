"""Jobs that are cut off and go on, and jobs that store and export the weights they began with."""

import shutil
from pathlib import Path
from typing import Any

from tests.distributed.jobs import job, method

# Of 3 steps an epoch 4 are done, with a checkpoint after 2: going on begins within one epoch and ends in the next.
STEPS, CHECKPOINT = 4, 2
PARALLEL: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "vp2": {"pipeline": 2, "virtual_pipeline": 2},
}
# By processes: what is trained to its end, what is cut off, and what goes on in fresh processes in which layout.
WHOLE = {1: ("one",), 2: ("pp2", "dp2")}
CUT = {1: ("one",), 2: ("pp2", "dp2", "vp2")}
CONTINUED = {
    1: (("one", "one-again", "one"), ("pp2", "pp2-at-one", "one"), ("vp2", "vp2-at-one", "one")),
    2: (("pp2", "pp2-again", "pp2"), ("dp2", "dp2-again", "dp2"), ("pp2", "pp2-at-tp2", "tp2")),
}
STORED = {1: ("one",), 2: ("tp2", "pp2", "vp2", "dp2")}


def _training(home: Path, folder: str, layout: str, **observed: Any) -> dict[str, Any]:
    parts = method(home, "ctpd", home / "one" / "cache") | {
        "parallel": PARALLEL[layout],
        "data": {"shuffle": True, "global_batch_size": 2},
        "optim": {"warmup_fraction": 0.25},
        "trainer": {"epochs": 2, "max_steps": STEPS, "checkpoint_every": CHECKPOINT},
    }
    return job(home, f"resume/{folder}", parts, **observed)


def cut_jobs(home: Path, processes: int) -> list[dict[str, Any]]:
    """Layouts trained to their end, and cut off after two steps; where it is alone, by SIGKILL in the third."""
    jobs = [_training(home, f"{name}-whole", name, export=True) for name in WHOLE[processes]]
    how = "kill" if processes == 1 else "stop"
    return jobs + [_training(home, f"{name}-cut", name, **{how: CHECKPOINT}) for name in CUT[processes]]


def continued_jobs(home: Path, processes: int) -> list[dict[str, Any]]:
    """The runs that were cut off, each in a copy of its folder."""
    jobs = []
    for source, target, layout in CONTINUED[processes]:
        # Without what the processes that were cut off observed.
        ignored = shutil.ignore_patterns("observed-*")
        shutil.copytree(home / "resume" / f"{source}-cut", home / "resume" / target, ignore=ignored)
        jobs.append(_training(home, target, layout, weights=[0], export=True))
    return jobs


def stored_jobs(home: Path, processes: int) -> list[dict[str, Any]]:
    """One step of a learning rate of zero: what is stored and exported is what was read."""
    jobs = []
    for layout in STORED[processes]:
        for policy in ("student", "teacher"):
            parts = method(home, "sft", home) | {
                "policy": policy,
                "parallel": PARALLEL[layout],
                "data": {"global_batch_size": 1},
                "optim": {"lr": 0.0},
                "trainer": {"max_steps": 1},
            }
            jobs.append(job(home, f"stored/{layout}-{policy}", parts, export=True))
    return jobs
