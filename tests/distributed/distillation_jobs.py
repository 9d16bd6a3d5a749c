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
STEPS = 4
GRADIENTS = (0, STEPS - 1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
}
ONLINE = ("uld", "uld_top_k", "multilevel_ot", "dskd")


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


def plain_method(home: Path, name: str) -> Distillation:
    """The same for ``plain.train``."""
    student, teacher = home / "student", home / "teacher"
    ot = {"weight": 1.5, "top_k": K, "logarithmic_weight": 0.1, "sequence_weight": 0.1}
    options: dict[str, Any] = {
        "uld": {"weight": 1.5},
        "uld_top_k": {"weight": 1.5, "top_k": K},
        "multilevel_ot": {**ot, "epsilon": 0.1, "iterations": 10},
        "dskd": {"rate": 0.5, "temperature": 2.0, "projector_lr": PROJECTOR_LR},
    }[name]
    extra = draw_projectors(32, 40, seed=0) if name == "dskd" else {}
    return Distillation(student, teacher, name.removesuffix("_top_k"), options, extra)


def score_job(home: Path, layout: str, folder: str, dtype: str = "float32", k: int = K) -> dict[str, Any]:
    """The job that fills the cache."""
    values = {"reference": str(home / "teacher"), "pairs_per_shard": 2, "top_k": k, "top_k_dtype": dtype}
    models = {side: {"path": str(home / side)} for side in ("student", "teacher")}
    parts = {"method": {"name": "score", "cache": str(home / folder), **values}, "model": models}
    return job(home, f"{folder}-job", {**parts, "parallel": LAYOUTS[layout]})


def layout_jobs(home: Path, names: tuple[str, ...], layout: str, **parts: Any) -> list[dict[str, Any]]:
    """Training jobs of a layout, in folders ``distillation/<layout>/<name>``."""
    models = {side: {"path": str(home / side)} for side in ("student", "teacher")}
    return [
        job(
            home,
            f"distillation/{layout}/{name}",
            {
                "method": method(name, home / "distillation" / "cache"),
                "model": models,
                "parallel": LAYOUTS[layout],
                "data": {"microbatch_tokens": 3 * MAX_LENGTH},
                "trainer": {"epochs": 2},
                **parts,
            },
            gradients=GRADIENTS,
            export=True,
        )
        for name in names
    ]


def train_plain(home: Path, name: str) -> plain.Trained:
    """What the jobs are compared with."""
    return plain.train(plain_method(home, name), home / "pairs.jsonl", GLOBAL_BATCH, OPTIM, STEPS)
