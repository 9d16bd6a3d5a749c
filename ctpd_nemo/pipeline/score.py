"""One scoring job: frozen models over preference pairs, into a span score cache."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.loader import StepDataset, StepLoader
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData, check_vocabulary
from ctpd_nemo.models.forward import sum_over_data_parallel
from ctpd_nemo.models.scorer import Float32Array, ScoreConfig, Scorer
from ctpd_nemo.parallel.layout import initialize, local_device, world_size
from ctpd_nemo.pipeline.fingerprints import score_fingerprints, weights_fingerprints
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_cache import PairScores, ScoreWriter
from ctpd_nemo.pipeline.trainer import build_trainer

logger = logging.getLogger(__name__)


def score(run: RunConfig) -> Path:
    """Score every span of ``data.train`` under the models of ``run.method``, and return the cache.

    With ``policy: student`` the spans are those that student and teacher share and the teacher's tokens are scored.
    With ``policy: teacher`` the spans are the teacher's own tokens.

    Raises:
        InputError: The configuration, data or weights cannot be used, or the cache that is there is of something else.
    """
    run.check(world_size())
    method = run.method
    if not isinstance(method, ScoreConfig):
        raise InputError("method.name", repr(method.name), "score")
    method.check()
    cache = Path(str(method.cache))
    data = RunData(run, ("chosen", "rejected"), two_sided=run.policy == "student")
    for folder in method.folders().values():
        check_vocabulary(data.encoder.reference, read_architecture(folder).vocab_size, folder)
    initialize(run.parallel, run.seed)
    writer = ScoreWriter(
        cache,
        score_fingerprints(data, run.precision.name),
        weights_fingerprints(method.folders()),
        len(data.train),
        method.pairs_per_shard,
    )
    on_rank_0(writer.begin)
    # Asked once: all ranks must share out the same shards, and the first are soon written.
    missing = on_rank_0(lambda: writer.missing(method.folders()))
    logger.info("%s: %d of %d shards to score", cache, len(missing), writer.n_shards)

    def shards(dp_rank: int, dp_size: int) -> StepLoader:
        return _loader(data, method.pairs_per_shard, missing[dp_rank::dp_size])

    def sink(role: str, shard: int, rows: Sequence[int], scores: Sequence[tuple[Float32Array, ...]]) -> None:
        ids = [data.train[row].id for row in rows]
        writer.write(role, shard, [PairScores(id_, *pair) for id_, pair in zip(ids, scores, strict=True)])

    if missing:
        trainer = build_trainer(run, total_steps=1)
        scorer = Scorer(run, method.folders(), shards, sink, trainer)
        trainer.predict(scorer, return_predictions=False)
        logger.info("%s: scored %s", cache, sum_over_data_parallel(scorer.stats, local_device()))
    dist.barrier()
    return cache


def _loader(data: RunData, pairs_per_shard: int, shards: Sequence[int]) -> StepLoader:
    batching = dataclasses.replace(data.batching, side="reference")
    plan = StepPlan.in_order(len(data.train), pairs_per_shard)
    return StepLoader(
        StepDataset(data.train, data.encoder, plan, batching),  # type: ignore[arg-type]
        sampler=shards,
        batch_size=None,
        num_workers=data.run.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
