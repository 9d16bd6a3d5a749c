"""One training job: from a configuration to a trained model in Hugging Face form."""

import dataclasses
import json
import logging
from pathlib import Path

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.parallel.checkpoint import find_checkpoints
from ctpd_nemo.parallel.layout import world_size
from ctpd_nemo.pipeline.callbacks import Checkpointing, MetricLog
from ctpd_nemo.pipeline.fingerprints import score_fingerprints
from ctpd_nemo.pipeline.score_cache import ScoreReader
from ctpd_nemo.pipeline.trainer import build_trainer

logger = logging.getLogger(__name__)


def train(run: RunConfig) -> Path:
    """Train by ``run.method`` and return the newest checkpoint.

    Raises:
        InputError: The configuration, data or weights cannot be used; nothing was trained.
    """
    run.parallel.check(world_size())
    run.optim.check()
    method = METHODS[run.method.name]
    reference = getattr(run.method, "reference", None)
    data = RunData(run, method.responses, method.two_sided, online=method.two_sided and reference == "online")
    if reference == "cache":
        data.scores = ScoreReader(
            run.method.scores,
            score_fingerprints(data, run.method.scoring_precision or run.precision.dtype),
            run.method if method.two_sided else None,
        )
    folder = Path(run.run_dir)
    checkpoints = folder / "checkpoints"
    callbacks = [
        MetricLog(folder / "metrics.jsonl"),
        Checkpointing(checkpoints, run.trainer.checkpoint_every, run.trainer.keep_checkpoints),
    ]
    trainer = build_trainer(run, data.total_steps, callbacks)
    model = method.model(run, data, trainer)
    newest = find_checkpoints(checkpoints)[-1:] if run.trainer.resume else []
    if not newest and find_checkpoints(checkpoints):
        raise InputError(str(checkpoints), "checkpoints, with trainer.resume false", "a run folder without checkpoints")
    if trainer.is_global_zero:
        _write_config(run, folder)
    trainer.fit(model, ckpt_path=str(newest[0]) if newest else None)
    return find_checkpoints(checkpoints)[-1]


def _write_config(run: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n", encoding="utf-8")
