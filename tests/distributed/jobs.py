"""Which jobs are run in which layout: the values of their configurations, see ``worker``."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed import plain
from tests.distributed.world import GLOBAL_BATCH, MAX_LENGTH

OPTIM = plain.Optim()
NUM_STEPS = 2
# Small, so that the margins of untrained models stay where the loss has a slope.
CTPD_BETA = 0.03

_COMMON = ("score", "sft", "dpo", "ctpd", "online")
# CTPD with another weighting or reference; each is trained from the cache, and with "-online" with models beside it.
VARIANTS: dict[str, dict[str, str]] = {
    **{
        name: {"weights": name}
        for name in (
            "contrastive_student",
            "teacher_student",
            "single_teacher",
            "average",
            "random",
            "uniform",
            "constant",
            "shuffled",
        )
    },
    "student_reference": {"reference_model": "student"},
    "student_only": {"reference_model": "student", "weights": "contrastive_student"},
}
_VARIANTS = (*VARIANTS, *(f"{name}-online" for name in VARIANTS))
# What is made of the same scores by the same lines as others.
_ALIKE = ("average-online", "uniform-online", "constant-online")
_TIS_DPO = ("score_own", "tis_dpo", "tis_dpo-cached")
# What reads the vocabulary anew, tokens of both sides, and the policy's own.
_FEW_VARIANTS = ("single_teacher-online", "contrastive_student-online", "teacher_student")


@dataclass(frozen=True)
class Layout:
    """A layout and what is run in it.

    Attributes:
        processes: How many there are.
        parallel: Values of ``ParallelConfig``.
        methods: Names of jobs, see ``method``; ``ctpd`` and its kin read the scores of this layout's ``score``, or of
            ``one``'s.
        packing: "packed", or "padded" with one pair a microbatch.
        precision: "fp32" or "bf16".
        encoded: Whether pairs are encoded ahead, by the first process while the others wait.
        slow: Left to the slow tests.
    """

    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = _COMMON
    packing: str = "packed"
    precision: str = "fp32"
    encoded: bool = False
    slow: bool = False


LAYOUTS = {
    "one": Layout(
        1,
        methods=(*_COMMON, "dpo_reverse", "same", *(name for name in _VARIANTS if name not in _ALIKE), *_TIS_DPO),
        packing="padded",
    ),
    "one-packed": Layout(1, {"distributed_optimizer": False}),
    "one-recompute-full": Layout(1, {"recompute": "full"}, ("ctpd",)),
    "one-recompute-selective": Layout(1, {"recompute": "selective"}, ("ctpd",)),
    "one-bf16": Layout(1, methods=("dpo", "online"), precision="bf16"),
    "tp2": Layout(2, {"tensor": 2}, (*_COMMON, *_FEW_VARIANTS, "tis_dpo")),
    "pp2": Layout(2, {"pipeline": 2}, (*_COMMON, *_FEW_VARIANTS, "tis_dpo")),
    "dp2": Layout(2, methods=(*_COMMON, "score_one_shard")),
    "sp2-recompute-full": Layout(2, {"tensor": 2, "sequence": True, "recompute": "full"}, ("sft", "dpo", "ctpd")),
    "vp2": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, ("sft", "dpo", "online")),
    "dp2-plain-optimizer": Layout(2, {"distributed_optimizer": False}, ("ctpd",), encoded=True),
    "cp2": Layout(2, {"context": 2}),
    "tp2pp2": Layout(4, {"tensor": 2, "pipeline": 2}, ("sft", "dpo", "ctpd", "online", "same")),
    "one-packed-variants": Layout(1, methods=("score", *_VARIANTS, *_TIS_DPO), slow=True),
    "tp2-variants": Layout(2, {"tensor": 2}, ("score", *_VARIANTS, *_TIS_DPO), slow=True),
    "pp2-variants": Layout(2, {"pipeline": 2}, ("score", *_VARIANTS, *_TIS_DPO), slow=True),
    "dp2-variants": Layout(2, {}, ("score", *_VARIANTS, *_TIS_DPO), slow=True),
    "cp2-variants": Layout(2, {"context": 2}, ("score", *_VARIANTS, *_TIS_DPO), slow=True),
    "tp2-padded": Layout(2, {"tensor": 2}, packing="padded", slow=True),
    "pp2-padded": Layout(2, {"pipeline": 2}, packing="padded", slow=True),
    "dp2-padded": Layout(2, packing="padded", slow=True),
    "sp2": Layout(2, {"tensor": 2, "sequence": True}, (*_COMMON, "same"), slow=True),
    "vp2-recompute-selective": Layout(
        2, {"pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"}, ("score", "ctpd", "same"), slow=True
    ),
    "tp2-same": Layout(2, {"tensor": 2}, ("same",), slow=True),
    "pp2-same": Layout(2, {"pipeline": 2}, ("same",), slow=True),
    "dp2-same": Layout(2, {}, ("same",), slow=True),
    "dp2-overlap": Layout(2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, ("sft", "ctpd")),
    "tp2pp2vp2-sequence": Layout(4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}, slow=True),
    "tp2dp2-sequence": Layout(4, {"tensor": 2, "sequence": True}, slow=True),
    "pp2dp2": Layout(4, {"pipeline": 2}, slow=True),
    "cp2-same": Layout(2, {"context": 2}, ("same",), slow=True),
    "cp2-padded": Layout(2, {"context": 2, "recompute": "full"}, packing="padded", slow=True),
    "tp2cp2-sequence": Layout(4, {"tensor": 2, "context": 2, "sequence": True}, slow=True),
    "pp2vp2cp2": Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, slow=True),
    "cp2dp2": Layout(4, {"context": 2}, slow=True),
    "cp4": Layout(4, {"context": 4}, slow=True),
}


def method(home: Path, name: str, cache: Path) -> dict[str, Any]:
    """The parts of a ``RunConfig`` that make a method; models are the folders of ``world``."""
    models = {side: {"path": str(home / side)} for side in ("student", "teacher")}
    contrastive = {role: str(home / role) for role in ("positive", "negative")}
    of_student = {f"student_{role}": str(home / f"student_{role}") for role in ("positive", "negative")}
    own_pair = {role: str(home / f"student_{role}") for role in ("positive", "negative")}
    ctpd, tis_dpo = {"name": "ctpd", "beta": CTPD_BETA}, {"name": "tis_dpo", "beta": CTPD_BETA}
    if name.removesuffix("-online") in VARIANTS:
        source = {"reference": "online", **contrastive, **of_student} if "-online" in name else {"scores": str(cache)}
        return {"method": {**ctpd, **VARIANTS[name.removesuffix("-online")], **source}, "model": models}
    return {
        "score": {
            "method": {"name": "score", "cache": str(cache), "reference": str(home / "teacher"), **contrastive}
            | {"pairs_per_shard": 2, "margin": True, "student": str(home / "student"), **of_student}
        },
        "score_own": {
            "method": {"name": "score", "cache": f"{cache}-own", "spans": "own"}
            | {"reference": str(home / "student"), **own_pair}
        },
        "tis_dpo": {"method": {**tis_dpo, **own_pair}},
        "tis_dpo-cached": {"method": {**tis_dpo, "reference": "cache", "scores": f"{cache}-own"}},
        # More replicas than shards.
        "score_one_shard": {"method": {"name": "score", "cache": f"{cache}-one-shard", **contrastive}},
        "sft": {"method": {"name": "sft"}, "policy": "teacher"},
        "dpo": {"method": {"name": "dpo"}},
        "dpo_reverse": {"method": {"name": "dpo", "reverse": True, "beta": 0.3}, "policy": "teacher"},
        "ctpd": {"method": {**ctpd, "scores": str(cache)}},
        "online": {"method": {**ctpd, "reference": "online", **contrastive}},
        # The teacher is the student itself, and every weight is 1.
        "same": {
            "method": {**ctpd, "reference": "online", "weights": "uniform"},
            "model": {"student": models["student"], "teacher": models["student"]},
        },
    }[name] | ({} if name == "same" else {"model": models})


def job(home: Path, folder: str, parts: dict[str, Any], **observed: Any) -> dict[str, Any]:
    """One job for ``worker``; ``parts`` go over the values that all jobs share, ``observed`` is what to write down."""
    run = {
        "run_dir": str(home / folder),
        "precision": {"dtype": "fp32"},
        **parts,
        "data": {
            "train": [str(home / "pairs.jsonl")],
            "max_length": MAX_LENGTH,
            "microbatch_tokens": 2 * MAX_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "shuffle": False,
            "num_workers": 0,
            **parts.get("data", {}),
        },
        "optim": {**dataclasses.asdict(OPTIM), "warmup_fraction": 0.0, **parts.get("optim", {})},
        "trainer": {"log_every": 1, **parts.get("trainer", {})},
    }
    return {"run": run, **observed}


def layout_jobs(home: Path, name: str) -> list[dict[str, Any]]:
    """All jobs of a layout, in folders ``<layout>/<method>``."""
    layout = LAYOUTS[name]
    cache = home / (name if "score" in layout.methods else "one") / "cache"
    jobs = []
    for method_name in layout.methods:
        parts = method(home, method_name, cache)
        parts |= {"parallel": layout.parallel, "precision": {"dtype": layout.precision}}
        # Two longest sequences, or two to three pairs end to end; of whole parts, where sequences are cut.
        parts_of_a_sequence = 2 * layout.parallel.get("context", 0) or 1
        length = MAX_LENGTH + -MAX_LENGTH % parts_of_a_sequence
        parts["data"] = {
            "packing": layout.packing,
            "microbatch_tokens": (2 if layout.packing == "padded" else 3) * length,
            "encoded": str(home / name / "encoded") if layout.encoded else None,
        }
        jobs.append(
            job(home, f"{name}/{method_name}", parts, gradients=[0, 1], export=not method_name.startswith("score"))
        )
    return jobs
