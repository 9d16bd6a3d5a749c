"""One training job: from a configuration to a distributed checkpoint, which ``export`` turns into a folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.distillation import DistillationConfig
from ctpd_nemo.models.folder import check_model
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.models.weighted import WeightedConfig
from ctpd_nemo.models.weighting import SpanDraws
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints, named_checkpoints, step_of
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.hang import watch_for_hangs
from ctpd_nemo.parallel.layout import initialize, world_size
from ctpd_nemo.pipeline.bad_steps import BadStepReport
from ctpd_nemo.pipeline.callbacks import DataReport, MetricLog, ProbeRecord
from ctpd_nemo.pipeline.checkpointing import Checkpointing, newest_whole
from ctpd_nemo.pipeline.claim import claim
from ctpd_nemo.pipeline.encoded import use_encoded
from ctpd_nemo.pipeline.fingerprints import score_fingerprints, weights_fingerprints
from ctpd_nemo.pipeline.heartbeat import Heartbeat
from ctpd_nemo.pipeline.origin import write_record
from ctpd_nemo.pipeline.pace import PaceWatch
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_cache import ScoreReader
from ctpd_nemo.pipeline.top_k_cache import TopKReader
from ctpd_nemo.pipeline.trained_side import check_beside
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
    set_deterministic(run.deterministic)
    method = METHODS.get(run.method.name)
    if method is None:
        raise InputError("method.name", repr(run.method.name), "one of " + ", ".join(METHODS))
    reference = getattr(run.method, "reference", None)
    weighted = run.method if isinstance(run.method, WeightedConfig) else None
    beside = method.two_sided and reference == "online" and (weighted is None or "reference" in weighted.sides())
    data = RunData(run, method.responses, method.two_sided, online=beside)
    check_beside(run.policy_side(), data.policy, f"model.{run.policy}")
    folders = _starting_weights(run, data)
    for role, path in folders.items():
        reads_as_policy = role == "policy" or (role in ROLES and ROLES[role].side == "policy")
        check_model(path, data.encoder.policy if reads_as_policy else data.encoder.reference, run)
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
        data.scores = SpanDraws(run.seed)
    data.weights = weights_fingerprints(folders)
    checkpoints = folder / "checkpoints"
    newest = _newest_checkpoint(run, checkpoints)
    checkpointing = Checkpointing(checkpoints, run.trainer)
    watch = PaceWatch(folder.name)
    heartbeat = Heartbeat(folder, run.parallel.timeout_minutes, watch.pace)
    own_callbacks = [
        LambdaCallback(on_train_start=lambda trainer, _: _write_record(run, data, trainer)),
        DataReport(folder.name, ", ".join(run.data.train)),
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
    trainer = build_trainer(run, data.total_steps, [*callbacks, *own_callbacks], done_steps)
    model = method.model(run, data, trainer)
    data.warn_of_choices()
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


def _starting_weights(run: RunConfig, data: RunData) -> dict[str, str]:
    """The folders whose weights the numbers of a run depend on, but for those that a score cache speaks for."""
    method, online = run.method, {}
    if isinstance(method, WeightedConfig):
        online = method.online_folders(run)
    elif isinstance(method, DistillationConfig) and method.reference == "online" and run.model.teacher.path:
        online = {"reference": run.model.teacher.path}
    return {"policy": data.policy_path, **online}


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


def _write_record(run: RunConfig, data: RunData, trainer: Trainer) -> None:
    if trainer.is_global_zero:
        held_out = {} if data.validation is None else {"validation": data.validation.fingerprint}
        write_record(run, {**data.fingerprints(), **held_out}, trainer.global_step)
