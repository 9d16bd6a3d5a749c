"""One scoring job: frozen models over preference pairs, into a span score cache."""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from numpy.typing import NDArray

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.encoded_pair import SideName
from ctpd_nemo.data.loader import StepDataset, StepLoader
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.forward import sum_over_data_parallel
from ctpd_nemo.models.memory import free_bytes, least_of_all_ranks, model_passes
from ctpd_nemo.models.roles import ROLES, by_model
from ctpd_nemo.models.scorer import Float32Array, ScoreConfig, Scorer, forward_budget
from ctpd_nemo.models.teacher import FrozenModel, weight_bytes
from ctpd_nemo.models.top_k import TopKScoring
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.hang import watch_for_hangs
from ctpd_nemo.parallel.layout import initialize, local_device
from ctpd_nemo.pipeline.callbacks import ScoreReport, StopBetweenShards
from ctpd_nemo.pipeline.encoded import use_encoded
from ctpd_nemo.pipeline.fingerprints import score_fingerprints, weights_fingerprints
from ctpd_nemo.pipeline.folder_watch import ScoringWatch, kept_run_folder
from ctpd_nemo.pipeline.heartbeat import Heartbeat
from ctpd_nemo.pipeline.origin import write_record
from ctpd_nemo.pipeline.preflight import check_job, check_models, model_folders, open_data
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_output import ScoreOutput
from ctpd_nemo.pipeline.trainer import build_trainer
from ctpd_nemo.run_folder import make_run_folder

logger = logging.getLogger(__name__)


def score(run: RunConfig) -> Path:
    """Score every span of ``data.train`` under the models of ``run.method``, and return the cache.

    With ``policy: student`` the spans are those that student and teacher share, unless ``method.spans`` is "own"; each
    role scores its side's tokens. With ``policy: teacher`` the spans are the teacher's own tokens.

    Raises:
        InputError: The configuration, data or weights cannot be used, or the cache that is there is of something else.
    """
    check_job(run)
    set_deterministic(run.deterministic)
    method = run.method
    if not isinstance(method, ScoreConfig):
        raise InputError("method.name", repr(method.name), "score")
    folder, folders = Path(run.run_dir), model_folders(run)
    data = open_data(run)
    check_models(run, data.encoder.policy, data.encoder.reference)
    initialize(run.parallel, run.seed)
    watch_for_hangs(folder, run.parallel.timeout_minutes)
    prints, weights = score_fingerprints(data, run.precision.of_frozen().name), weights_fingerprints(folders)
    cache = ScoreOutput(data, prints, weights)
    cache.begin()
    use_encoded(data)
    # Asked once: all ranks must hold the same models, and share out the same shards.
    todo = on_rank_0(lambda: {role: path for role, path in folders.items() if cache.missing([role])})
    if not todo:
        logger.info("%s: no shard to score", cache.folder)
        return cache.folder
    weighed = {f"{role}_weights": told for role, told in weights.items()}
    record = on_rank_0(lambda: write_record(run, {**prints, **weighed}))
    make_run_folder(folder)
    run_folder = kept_run_folder(folder, "", (lambda: record) if dist.get_rank() == 0 else None)
    watch = ScoringWatch([run_folder, *cache.kept_folders()])
    data.warn_of_choices()
    heartbeat = Heartbeat(folder, run.parallel.timeout_minutes)
    callbacks = [watch, ScoreReport(cache.folder.name, run.data.warn_skipped), StopBetweenShards(), heartbeat]
    trainer = build_trainer(run, total_steps=1, callbacks=callbacks)
    for roles in _passes(run, todo):
        shards = on_rank_0(functools.partial(cache.missing, roles))
        told = cache.folder, len(shards), cache.n_shards, " and ".join(roles)
        logger.info("%s: %d of %d shards to score, %s", *told)
        _pass(data, {role: todo[role] for role in roles}, shards, cache, watch, trainer)
    dist.barrier()
    cache.check_written()
    if trainer.is_global_zero:
        heartbeat.end("finished")
    return cache.folder


def _passes(run: RunConfig, folders: Mapping[str, str]) -> list[list[str]]:
    """The roles of each pass over the data, alike on every rank; models that read other tokens have other passes."""
    if not folders:
        return []
    free, passes = least_of_all_ranks(free_bytes()), []
    models = by_model(folders)
    for side in ("reference", "policy"):
        names = [name for name in models if ROLES[name].side == side]
        architectures = [read_architecture(folders[models[name][0]]) for name in names]
        weights = [weight_bytes(architecture, run.parallel, run.precision) for architecture in architectures]
        chosen = model_passes(weights, free, run.method.together)
        passes += [[role for number in numbers for role in models[names[number]]] for numbers in chosen if numbers]
    return passes


def _pass(
    data: RunData,
    folders: Mapping[str, str],
    missing: Sequence[int],
    cache: ScoreOutput,
    watch: ScoringWatch,
    trainer: Trainer,
) -> None:
    """Score the missing shards under the models that are held together."""
    pairs_per_shard = data.run.method.pairs_per_shard
    models = by_model(folders)
    side = ROLES[next(iter(models))].side

    def shards(dp_rank: int, dp_size: int, microbatch_tokens: int) -> StepLoader:
        return _loader(data, side, pairs_per_shard, missing[dp_rank::dp_size], microbatch_tokens)

    def sink(role: str, shard: int, rows: Sequence[int], scores: Sequence[tuple[Float32Array, ...]]) -> None:
        data.train.check_unchanged()
        with watch.writing():
            cache.write(role, shard, rows, scores)

    def keep_top_k(shard: int, rows: Sequence[int], found: Sequence[tuple[NDArray[Any], ...]]) -> None:
        data.train.check_unchanged()
        with watch.writing():
            cache.write_top_k(shard, rows, found)

    def budget(models: Mapping[str, FrozenModel]) -> int:
        return forward_budget(models, data, side, pairs_per_shard)

    top_k = data.run.method.top_k
    keeping = TopKScoring(top_k, keep_top_k) if top_k is not None else None
    scorer = Scorer(data.run, folders, shards, budget, sink, trainer, keeping)
    trainer.predict(scorer, return_predictions=False)
    # Every replica is done when the counts are summed.
    stats = sum_over_data_parallel(scorer.stats, local_device())
    rate = len(models) * stats.tokens / (time.perf_counter() - scorer.started)
    logger.info(
        "%s: scored %s; %s in one pass, %d tokens a microbatch, %.0f tokens/s",
        cache.folder,
        stats,
        " and ".join(folders),
        scorer.microbatch_tokens,
        rate,
    )
    scorer.release()


def _loader(
    data: RunData, side: SideName, pairs_per_shard: int, shards: Sequence[int], microbatch_tokens: int
) -> StepLoader:
    batching = dataclasses.replace(data.batching, side=side, microbatch_tokens=microbatch_tokens)
    plan = StepPlan.in_order(len(data.train), pairs_per_shard)
    return StepLoader(
        StepDataset(data.train, data.encoder, plan, batching, encoded=data.encoded.get("train")),  # type: ignore[arg-type]
        sampler=shards,
        batch_size=None,
        num_workers=data.run.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
