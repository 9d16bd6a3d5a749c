"""Jobs of the distillation baselines: what is run in which layout, see ``worker``."""

from pathlib import Path
from typing import Any

from tests.distributed import plain
from tests.distributed.jobs import OPTIM, job
from tests.distributed.plain_distillation import Distillation, draw_projectors
from tests.distributed.world import GLOBAL_BATCH, MAX_LENGTH

K = 20
# So large that after three steps, of 5, 1 and 5 pairs, some projections are right: until then a term is zero.
PROJECTOR_LR = 3e-2
STEPS, CUT = 4, 2
GRADIENTS = (0, STEPS - 1)
ONLINE = ("uld", "uld_top_k", "multilevel_ot", "dskd")
CACHED = ("uld_top_k-cache", "multilevel_ot-cache")
PARALLEL: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2-overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2": {"context": 2},
    "sp2": {"tensor": 2, "sequence": True, "recompute": "full"},
    "vp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
# By processes, and whether it is slow: what is trained in which layout.
TRAINED: dict[tuple[int, bool], dict[str, tuple[str, ...]]] = {
    (1, False): {"one": (*ONLINE, *CACHED)},
    (2, False): {
        "tp2": (*ONLINE, "uld_top_k-cache"),
        "pp2": ("uld", "multilevel_ot", "dskd", "multilevel_ot-cache"),
        "dp2-overlap": ("dskd",),
    },
    (2, True): {
        "cp2": (*ONLINE, "multilevel_ot-cache"),
        "sp2": ONLINE,
        "vp2": ONLINE,
        "dp2-overlap": ("uld", "multilevel_ot-cache"),
    },
    (4, True): {"tp2pp2": (*ONLINE, *CACHED)},
}
# Whose cache is compared; that of one process is the one that is read.
SCORED = {(1, False): ("one",), (2, False): ("tp2", "dp2-overlap"), (2, True): ("cp2",)}
# DSKD cut off and gone on with: from which layout, in which.
CONTINUED = {1: (("one", "one"),), 2: (("pp2", "pp2"), ("pp2", "tp2"))}


def method(name: str, cache: Path) -> dict[str, Any]:
    """The method of a job; names that end in "cache" read the teacher from there."""
    kind, _, source = name.partition("-")
    config = {
        "uld": {"name": "uld"},
        "uld_top_k": {"name": "uld", "top_k": K},
        "multilevel_ot": {"name": "multilevel_ot", "top_k": K},
        "dskd": {"name": "dskd", "projector_lr": PROJECTOR_LR},
    }[kind]
    return config | ({"reference": "cache", "scores": str(cache)} if source == "cache" else {})


def plain_method(home: Path, name: str, flipped: bool) -> Distillation:
    """The same for ``plain.train``."""
    transport = {"logarithmic_weight": 0.1, "sequence_weight": 0.1, "epsilon": 0.1, "iterations": 10}
    options: dict[str, Any] = {
        "uld": {"weight": 1.5},
        "uld_top_k": {"weight": 1.5, "top_k": K},
        "multilevel_ot": {"weight": 1.5, "top_k": K, **transport},
        "dskd": {"rate": 0.5, "temperature": 2.0, "projector_lr": PROJECTOR_LR},
    }[name]
    extra = draw_projectors(32, 40, seed=0) if name == "dskd" else {}
    return Distillation(home / "student", home / "teacher", name.removesuffix("_top_k"), options, extra, flipped)


def train_plain(home: Path, name: str, flipped: bool = False) -> plain.Trained:
    """What the jobs are compared with; the cache holds what a teacher beside the student says."""
    method = plain_method(home, name.removesuffix("-cache"), flipped)
    return plain.train(method, home / "pairs.jsonl", GLOBAL_BATCH, OPTIM, STEPS)


def score_job(home: Path, layout: str) -> dict[str, Any]:
    """The job that fills the cache of a layout."""
    folder = f"distillation/{layout}/cache"
    values = {"reference": str(home / "teacher"), "pairs_per_shard": 2, "top_k": K, "top_k_dtype": "float32"}
    return _job(home, f"{folder}-job", layout, {"name": "score", "cache": str(home / folder), **values})


def all_jobs(home: Path, processes: int, slow: bool) -> list[dict[str, Any]]:
    """Caches, training jobs in folders ``distillation/<layout>/<name>``, and runs that are cut off and go on."""
    jobs = [score_job(home, layout) for layout in SCORED.get((processes, slow), ())]
    for layout, names in TRAINED[processes, slow].items():
        for name in names:
            config = method(name, home / "distillation" / "one" / "cache")
            jobs.append(_job(home, f"distillation/{layout}/{name}", layout, config, gradients=GRADIENTS, export=True))
    return jobs if slow else [*jobs, *_continued_jobs(home, processes)]


def _continued_jobs(home: Path, processes: int) -> list[dict[str, Any]]:
    """Each of two jobs in one folder: the second begins with what the first has left there."""
    jobs = []
    for source, target in CONTINUED[processes]:
        for layout, observed in (
            (source, {"stop": CUT}),
            (target, {"weights": [0], "gradients": [STEPS - 1 - CUT], "export": True}),
        ):
            folder, config = f"distillation/{source}-at-{target}", method("dskd", home)
            jobs.append(_job(home, folder, layout, config, checkpoint_every=CUT, **observed))
    return jobs


def _job(
    home: Path, folder: str, layout: str, config: dict[str, Any], checkpoint_every: int = 0, **observed: Any
) -> dict[str, Any]:
    parts = {
        "method": config,
        "model": {side: {"path": str(home / side)} for side in ("student", "teacher")},
        "parallel": PARALLEL[layout],
        "data": {"microbatch_tokens": 3 * MAX_LENGTH + -3 * MAX_LENGTH % 4},
        "trainer": {"epochs": 2, "checkpoint_every": checkpoint_every},
    }
    return job(home, folder, parts, **observed)
