"""One training job: from a configuration to a distributed checkpoint, which ``export`` turns into a folder."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Callback, LambdaCallback

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.parallel.checkpoint import find_checkpoints
from ctpd_nemo.parallel.layout import initialize, world_size
from ctpd_nemo.pipeline.callbacks import Checkpointing, DataReport, MetricLog
from ctpd_nemo.pipeline.encoded import use_encoded
from ctpd_nemo.pipeline.fingerprints import score_fingerprints, weights_fingerprints
from ctpd_nemo.pipeline.origin import write_origin
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_cache import ScoreReader
from ctpd_nemo.pipeline.trainer import build_trainer

logger = logging.getLogger(__name__)


def train(run: RunConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Train by ``run.method`` and return the newest checkpoint.

    Args:
        run: The configuration.
        callbacks: What else is to happen beside the loop; called before the job's own.

    Raises:
        InputError: The configuration, data or weights cannot be used; nothing was trained.
    """
    run.check(world_size())
    method = METHODS.get(run.method.name)
    if method is None:
        raise InputError("method.name", repr(run.method.name), "one of " + ", ".join(METHODS))
    reference = getattr(run.method, "reference", None)
    data = RunData(run, method.responses, method.two_sided, online=method.two_sided and reference == "online")
    initialize(run.parallel, run.seed)
    use_encoded(data)
    if reference == "cache":
        data.scores = _open_scores(run, data, method.two_sided)
    data.weights = weights_fingerprints(_starting_weights(run, data))
    folder = Path(run.run_dir)
    checkpoints = folder / "checkpoints"
    newest = on_rank_0(lambda: _newest_checkpoint(run, checkpoints))
    own_callbacks = [
        LambdaCallback(
            on_train_start=lambda trainer, _: _write_config(run, folder) if trainer.is_global_zero else None
        ),
        DataReport(folder.name, ", ".join(run.data.train)),
        MetricLog(folder / "metrics.jsonl"),
        Checkpointing(checkpoints, run.trainer.checkpoint_every, run.trainer.keep_checkpoints),
    ]
    trainer = build_trainer(run, data.total_steps, [*callbacks, *own_callbacks])
    model = method.model(run, data, trainer)
    trainer.fit(model, ckpt_path=str(newest) if newest else None)
    checkpoint = on_rank_0(lambda: find_checkpoints(checkpoints)[-1])
    logger.info("%-13s checkpoint: %s", folder.name, checkpoint)
    return checkpoint


def _starting_weights(run: RunConfig, data: RunData) -> dict[str, str]:
    """The folders whose weights the numbers of a run depend on, but for those that a score cache speaks for."""
    folders = {"policy": data.policy_path}
    if data.batching.online:
        named = {"reference": run.model.teacher.path}
        named |= {role: getattr(run.method, role, None) for role in ("positive", "negative")}
        folders |= {role: folder for role, folder in named.items() if folder}
    return folders


def _open_scores(run: RunConfig, data: RunData, two_sided: bool) -> ScoreReader:
    """The score cache, checked against this run, and against the weights of every scored model that it names."""
    method = run.method
    folders = {"reference": run.model.teacher.path if two_sided else data.policy_path}
    if two_sided:
        folders |= {"positive": method.positive, "negative": method.negative}
    return ScoreReader(
        method.scores,
        score_fingerprints(data, method.scoring_precision or run.precision.name),
        weights_fingerprints({role: folder for role, folder in folders.items() if folder}),
        method if two_sided else None,
    )


def _newest_checkpoint(run: RunConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from, where there is one."""
    found = find_checkpoints(checkpoints)
    if found and not run.trainer.resume:
        raise InputError(str(checkpoints), "checkpoints, with trainer.resume false", "a run folder without checkpoints")
    return found[-1] if found else None


def _write_config(run: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n", encoding="utf-8")
    write_origin(folder)
