"""A run of the package as ``gpu_step.py`` needs it: shapes without weights, real pairs, a precision by name."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from ctpd_nemo.data.config import DataConfig
from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.models.config import ModelsConfig, RunConfig, SideConfig, TrainerConfig
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.optimizer import OptimConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.pipeline.config import typed
from gpu_cases.setting import Setting
from gpu_cases.shapes import write_folder

_PRECISIONS = Path(__file__).resolve().parents[2] / "conf" / "precision"


def precision_config(name: str) -> PrecisionConfig:
    """The precision of a file in ``conf/precision``."""
    return typed(PrecisionConfig, OmegaConf.load(_PRECISIONS / f"{name}.yaml"))


def run_config(
    setting: Setting,
    folder: Path,
    student: tuple[dict[str, Any], int],
    teacher: tuple[dict[str, Any], int],
    precision: str,
    microbatch_tokens: int,
) -> RunConfig:
    """A training run of a student on its teacher.

    Args:
        setting: Of all cases.
        folder: Models, data and logs are written here.
        student: Its shape, and how many layers of it.
        teacher: Likewise.
        precision: By name.
        microbatch_tokens: Of the setting, for training or for scoring.
    """
    write_folder(folder / "student", student[0], setting.student_tokenizer, student[1])
    write_folder(folder / "teacher", teacher[0], setting.teacher_tokenizer, teacher[1])
    lines = setting.preferences.read_text(encoding="utf-8").splitlines(keepends=True)[: setting.pairs]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    steps = setting.steps + setting.profile
    return RunConfig(
        method=CTPDConfig(scores="invented"),
        run_dir=str(folder / "run"),
        model=ModelsConfig(SideConfig(str(folder / "student")), SideConfig(str(folder / "teacher"))),
        data=DataConfig(
            train=[str(folder / "pairs.jsonl")],
            max_length=setting.max_length,
            global_batch_size=setting.batch,
            microbatch_tokens=microbatch_tokens,
            num_workers=setting.workers,
        ),
        optim=OptimConfig(),
        parallel=ParallelConfig(recompute=setting.recompute),
        precision=precision_config(precision),
        trainer=TrainerConfig(epochs=-(-steps * setting.batch // setting.pairs), max_steps=steps),
    )


class InventedScores:
    """What a score cache would give: as many numbers, whose values cost nothing."""

    fingerprint = "invented"

    def __init__(self, data: RunData) -> None:
        rows = range(len(data.train))
        encoded = data.encoder.encode(rows, [data.train[row] for row in rows])
        self._spans = {
            pair.id: (pair.chosen.n_spans, pair.rejected.n_spans) for pair in encoded if isinstance(pair, EncodedPair)
        }

    def lookup(self, pair: EncodedPair) -> tuple[NDArray[np.float32], ...]:
        """Reference log-probs of chosen and rejected, then importance weights of both."""
        reference = [np.full(spans, -2.0, dtype=np.float32) for spans in self._spans[pair.id]]
        weights = [np.ones(spans, dtype=np.float32) for spans in self._spans[pair.id]]
        return *reference, *weights
