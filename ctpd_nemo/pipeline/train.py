"""One training job: from a configuration to a distributed checkpoint, which ``export`` turns into a folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.distillation import DistillationConfig
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.models.weighted import WeightedConfig
from ctpd_nemo.models.weighting import SpanDraws
from ctpd_nemo.parallel.checkpoint import read_state
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints, named_checkpoints, step_of
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.hang import watch_for_hangs
from ctpd_nemo.parallel.layout import initialize
from ctpd_nemo.pipeline.bad_steps import BadStepReport
from ctpd_nemo.pipeline.callbacks import DataReport, DataWatch, MetricLog, ProbeRecord
from ctpd_nemo.pipeline.checkpointing import Checkpointing, newest_whole
from ctpd_nemo.pipeline.claim import claim
from ctpd_nemo.pipeline.encoded import use_encoded
from ctpd_nemo.pipeline.fingerprints import score_fingerprints, weights_fingerprints
from ctpd_nemo.pipeline.folder_watch import FolderWatch
from ctpd_nemo.pipeline.heartbeat import Heartbeat
from ctpd_nemo.pipeline.origin import write_record
from ctpd_nemo.pipeline.pace import PaceWatch
from ctpd_nemo.pipeline.preflight import (
    check_job,
    check_models,
    check_room,
    check_shared,
    checkpoint_bytes,
    method_of,
    model_folders,
    open_data,
)
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_cache import ScoreReader
from ctpd_nemo.pipeline.top_k_cache import TopKReader
from ctpd_nemo.pipeline.trained_side import check_beside
from ctpd_nemo.pipeline.trainer import build_trainer
from ctpd_nemo.run_folder import make_run_folder

logger = logging.getLogger(__name__)


def train(run: RunConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Train by ``run.method`` and return the newest checkpoint.

    Args:
        run: The configuration.
        callbacks: What else is to happen beside the loop; called before the job's own.

    Raises:
        InputError: The configuration, data or weights cannot be used; nothing was trained.
    """
    check_job(run)
    set_deterministic(run.deterministic)
    method, data = method_of(run), open_data(run)
    check_beside(run.policy_side(), data.policy, f"model.{run.policy}")
    check_models(run, data.encoder.policy, data.encoder.reference)
    reference = getattr(run.method, "reference", None)
    weighted = run.method if isinstance(run.method, WeightedConfig) else None
    initialize(run.parallel, run.seed)
    folder = Path(run.run_dir)
    watch_for_hangs(folder, run.parallel.timeout_minutes)
    on_rank_0(lambda: claim(folder))
    use_encoded(data)
    if reference == "cache" and isinstance(run.method, DistillationConfig):
        data.top_k = _open_top_k(run, data)
    elif reference == "cache":
        data.scores = _open_scores(run, data)
    elif weighted is not None and weighted.weighting(run.seed).draws:
        data.scores = SpanDraws(run.seed, data.train.shared_ids)
    if data.validation is not None:
        # That held-out pairs have no scores is known before models are built.
        data.scores_of("validation"), data.top_k_of("validation")
    data.weights = weights_fingerprints(model_folders(run))
    checkpoints = folder / "checkpoints"
    newest = _newest_checkpoint(run, checkpoints)
    checkpointing = Checkpointing(checkpoints, run.trainer)
    watch = PaceWatch(folder.name)
    heartbeat = Heartbeat(folder, run.parallel.timeout_minutes, watch.pace)
    own_callbacks = [
        FolderWatch(folder, lambda trainer: _write_record(run, data, trainer)),
        DataReport(folder.name, ", ".join(run.data.train), run.data.warn_skipped),
        DataWatch(data),
        MetricLog(folder / "metrics.jsonl"),
        watch,
        heartbeat,
        BadStepReport(folder, run.trainer.max_bad_steps),
        ProbeRecord(folder),
        checkpointing,
    ]
    done_steps = step_of(newest) if newest else 0
    if done_steps > data.total_steps:
        expected = f"at most {data.total_steps}, the steps of the whole run by trainer.epochs and trainer.max_steps"
        raise InputError(f"{newest}, resume, steps", f"{done_steps} steps that are done", expected)
    if done_steps < data.total_steps:
        on_rank_0(lambda: check_room(folder, checkpoint_bytes(data.policy_path)))
    on_rank_0(lambda: make_run_folder(folder))
    check_shared("run_dir", folder)
    make_run_folder(folder)
    trainer = build_trainer(run, data.total_steps, [*callbacks, *own_callbacks], done_steps)
    model = method.model(run, data, trainer)
    data.warn_of_choices()
    # Without a checkpoint, that the names in resume.allow are some.
    model.check_fingerprints(read_state(newest).fingerprints if newest else model.fingerprints())
    trainer.fit(model, ckpt_path=str(newest) if newest else None)
    if checkpointing.failure is not None:
        if trainer.is_global_zero:
            heartbeat.end("failed", error=checkpointing.failure)
        expected = "room for the last checkpoint; started again, training goes on from the one before"
        raise InputError(str(checkpoints), checkpointing.failure, expected)
    if trainer.is_global_zero:
        heartbeat.end("finished", step=data.total_steps, steps=data.total_steps)
    checkpoint = on_rank_0(lambda: find_checkpoints(checkpoints)[-1])
    logger.info("%-13s checkpoint: %s", folder.name, checkpoint)
    return checkpoint


def _open_scores(run: RunConfig, data: RunData) -> ScoreReader:
    """The score cache, checked against this run, and against the weights of every scored model that it names."""
    method = run.method
    weighted = method if isinstance(method, WeightedConfig) else None
    models = {"reference": data.policy_path} if weighted is None else weighted.folders(run)
    roles = ("reference",) if weighted is None else weighted.roles()
    folders = {name: models[ROLES[name].margin_of or name] for name in roles}
    second = getattr(method, "student_scores", None)
    return ScoreReader(
        method.scores,
        score_fingerprints(data, method.scoring_precision or run.precision.of_frozen().name),
        weights_fingerprints({role: folder for role, folder in folders.items() if folder}),
        weighted,
        run.seed,
        [second] if second else [],
        data.train.shared_ids,
    )


def _open_top_k(run: RunConfig, data: RunData) -> TopKReader:
    """The teacher's largest log-probs, checked against this run, and the teacher's weights where it names them."""
    teacher = run.model.teacher.path
    return TopKReader(
        run.method.scores,
        score_fingerprints(data, run.method.scoring_precision or run.precision.of_frozen().name),
        weights_fingerprints({"reference": teacher})["reference"] if teacher else None,
    )


def _newest_checkpoint(run: RunConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from, where there is one."""
    if not run.trainer.resume and on_rank_0(lambda: bool(named_checkpoints(checkpoints))):
        raise InputError(str(checkpoints), "checkpoints, with trainer.resume false", "a run folder without checkpoints")
    return newest_whole(checkpoints)


def _write_record(run: RunConfig, data: RunData, trainer: Trainer) -> dict[str, Any]:
    held_out = {} if data.validation is None else {"validation": data.validation.fingerprint}
    return write_record(run, {**data.fingerprints(), **held_out}, trainer.global_step)
