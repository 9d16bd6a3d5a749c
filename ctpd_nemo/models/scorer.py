"""The forward-only job that fills the span score cache."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from nemo.core.classes import ModelPT
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encoded_pair import SideName
from ctpd_nemo.data.loader import StepBatch, StepLoader, StepStats
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.memory import (
    free_bytes,
    full_microbatch,
    largest_microbatch,
    least_of_all_ranks,
    most_indexed_tokens,
)
from ctpd_nemo.models.roles import ROLES, by_model, score_roles
from ctpd_nemo.models.teacher import FrozenModel
from ctpd_nemo.models.top_k import TopKScoring
from ctpd_nemo.parallel.layout import local_device

Float32Array = NDArray[np.float32]


@dataclass
class ScoreConfig:
    """Which models to score, and where the scores go.

    Attributes:
        cache: Folder of the span score cache.
        reference: Hugging Face folder of the model that is the reference; ``None`` leaves the role for another job.
        positive: The reference's family trained by DPO, likewise.
        negative: The same trained on swapped pairs, likewise.
        margin: Also keep the margins of the reference, for ``weights: single_teacher``; in the same forward pass
            unless ``top_k`` is kept.
        student: The model that is the student before it is trained, on its own tokens of the shared spans, likewise.
        student_positive: The student trained by DPO, likewise.
        student_negative: The student trained on swapped pairs, likewise.
        spans: "shared" by student and teacher, of which roles read the teacher's tokens but for the three of the
            student; or the policy's "own" tokens, each a span, for DPO and TIS-DPO. ``None``: shared where the policy
            is the student, own where it is the teacher.
        top_k: Also keep the reference's ``top_k`` largest log-probs at each token of the chosen responses, for
            distillation from the cache.
        top_k_dtype: "float16" or "float32", of those.
        pairs_per_shard: Pairs of one file of the cache, and what a job that is cut off does again at most.
        together: Whether all models that read the same tokens are held at once and the data is gone through once, or
            one model after the other; ``None`` holds as many at once as fit.
        microbatch_tokens: Tokens of a forward pass at most; ``None`` for the most that fit on a GPU, and for
            ``data.microbatch_tokens`` on a CPU, which is no faster with more. Scores do not depend on it beyond
            rounding.
    """

    name: str = "score"
    cache: str | None = None
    reference: str | None = None
    positive: str | None = None
    negative: str | None = None
    margin: bool = False
    student: str | None = None
    student_positive: str | None = None
    student_negative: str | None = None
    spans: str | None = None
    top_k: int | None = None
    top_k_dtype: str = "float16"
    pairs_per_shard: int = 512
    together: bool | None = None
    microbatch_tokens: int | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` where there is nothing to do, or nowhere to write."""
        if not self.cache:
            raise InputError("method.cache", "nothing", "a folder for the scores")
        if not self.folders():
            raise InputError("method", "no model", "a folder for one or more of " + ", ".join(by_model(ROLES)))
        for name, value in (("margin", self.margin), ("top_k", self.top_k)):
            if value and not self.reference:
                raise InputError(f"method.{name}", f"{value} without method.reference", "the folder of that model")
        if self.spans not in (None, "shared", "own"):
            raise InputError("method.spans", repr(self.spans), "shared or own")
        if self.top_k_dtype not in ("float16", "float32"):
            raise InputError("method.top_k_dtype", repr(self.top_k_dtype), "float16 or float32")
        for name in ("pairs_per_shard", "microbatch_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"method.{name}", str(value), "1 or more")

    def folders(self) -> dict[str, str]:
        """The folder of each role that is to be scored."""
        models = {name: getattr(self, role.margin_of or name) for name, role in ROLES.items()}
        return {name: folder for name, folder in models.items() if folder and getattr(self, name)}

    def two_sided(self, policy: str) -> bool:
        """Whether spans are those that student and teacher share.

        Raises:
            InputError: Such spans of a teacher alone, or a role that only they have.
        """
        if self.spans == "shared" and policy != "student":
            raise InputError("method.spans", f"'shared' with policy {policy}", "own, or policy student")
        two_sided = policy == "student" and self.spans != "own"
        for role in self.folders():
            if not two_sided and ROLES[role].side == "policy":
                expected = "reference, positive or negative: with spans of its own there is one side"
                raise InputError(f"method.{role}", "a folder", expected)
        return two_sided


class ScoreSink(Protocol):
    """Takes the scores of one shard."""

    def __call__(self, role: str, shard: int, rows: Sequence[int], scores: Sequence[tuple[Float32Array, ...]]) -> None:
        """Keep the span log-probs of chosen and rejected of some pairs.

        Args:
            role: Which model gave them.
            shard: The number of the shard.
            rows: Dataset rows of the pairs.
            scores: For each, f32 ``[n_spans]`` of chosen and of rejected.
        """


class Scorer(ModelPT):
    """Scores the spans of every pair under one or more frozen models, in one pass over the data.

    Data-parallel replicas work through shards of their own and never wait for each other.

    Attributes:
        stats: What this replica has scored, and what it had to leave out.
        microbatch_tokens: Tokens of a forward pass at most; known once the models are there.
        started: When the models were there, on the clock of ``time.perf_counter``.
    """

    def __init__(
        self,
        run: RunConfig,
        folders: Mapping[str, str],
        shards: Callable[[int, int, int], StepLoader],
        budget: Callable[[Mapping[str, FrozenModel]], int],
        sink: ScoreSink,
        trainer: Trainer,
        top_k: TopKScoring | None = None,
    ) -> None:
        """Args:
        run: The configuration; parallel layout and precision are the scored models'.
        folders: Hugging Face folder of each role; the models of all of them read the same tokens.
        shards: From data-parallel rank and size and the tokens of a microbatch to a loader of the shards that this
            replica does, one an item.
        budget: From the models to the tokens of a microbatch; all ranks call it together.
        sink: Where scores go; called on one rank of each replica.
        trainer: Lightning's trainer with a ``MegatronStrategy``.
        top_k: What else is kept of the reference; ``None`` for nothing.
        """
        super().__init__(OmegaConf.create({"roles": dict(folders)}), trainer)
        self.run = run
        self.folders = folders
        self.shards = shards
        self.budget = budget
        self.sink = sink
        self.top_k = top_k
        self.models: dict[str, FrozenModel] = {}
        self.chunks: list[Any] = []
        self.stats = StepStats()
        # There may be more replicas than shards.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def configure_model(self) -> None:
        """Read the frozen models; Lightning calls it when the process groups are there."""
        for name, roles in by_model(self.folders).items():
            self.models[name] = FrozenModel(self.folders[roles[0]], self.run.parallel, self.run.precision)
        self.microbatch_tokens = self.budget(self.models)
        self.started = time.perf_counter()

    def release(self) -> None:
        """Free the models, so that others can take their place."""
        self.models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def predict_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Score one shard and hand it to the sink."""
        self.stats += batch.stats
        microbatches, roles, found = batch.microbatches, list(self.folders), {}
        if self.top_k is not None and "reference" in self.models:
            roles.remove("reference")
            found["reference"] = self.top_k.score(self.models["reference"], batch, write=_speaks_for_replica())
        # All models of a pass read the same side, which these are of.
        found |= score_roles(self.models, roles, {"policy": microbatches, "reference": microbatches})
        for role, scores in found.items():
            if scores and _speaks_for_replica():
                pairs = [pair for spans, part in zip(microbatches, scores, strict=True) for pair in _pairs(spans, part)]
                pairs.sort(key=lambda pair: pair[0])
                self.sink(
                    role, batch.step, [row for row, *_ in pairs], [(chosen, rejected) for _, chosen, rejected in pairs]
                )

    def predict_dataloader(self) -> StepLoader:
        """The shards of this replica."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return self.shards(rank, size, self.microbatch_tokens)

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Move the microbatches of a shard."""
        batch.microbatches = [microbatch.to(local_device()) for microbatch in batch.microbatches]
        return batch

    @classmethod
    def list_available_models(cls) -> None:
        """None: weights come from Hugging Face folders."""

    def setup_training_data(self, train_data_config: Any = None) -> None:
        """Nothing is trained."""

    def setup_validation_data(self, val_data_config: Any = None) -> None:
        """Nothing is validated."""


def forward_budget(models: Mapping[str, FrozenModel], data: RunData, side: SideName, pairs_per_shard: int) -> int:
    """Tokens of a forward pass at most, alike on every rank: as configured, or on a GPU as many as fit.

    Args:
        models: All that are held.
        data: Of the job.
        side: Whose tokens they read.
        pairs_per_shard: Pairs of one file of the cache.

    Raises:
        InputError: Not even ``data.microbatch_tokens`` fit.
    """
    run, device = data.run, local_device()
    if run.method.microbatch_tokens is not None or device.type == "cpu":
        return run.method.microbatch_tokens or run.data.microbatch_tokens
    rows = range(min(pairs_per_shard, len(data.train)))
    most = int(data.source("train").lengths(rows, side, ("chosen", "rejected"))[0].sum())
    if run.parallel.pipeline > 1:
        # The pipeline is full only while there are several microbatches a stage.
        most //= 4 * run.parallel.pipeline
    for model in models.values():
        most = min(most, most_indexed_tokens(model.architecture, run.parallel))

    def peak_of(tokens: int) -> int:
        microbatch = full_microbatch(tokens, run.data.max_length, data.batching).to(device)
        try:
            return max(peak_bytes(model, [microbatch] * run.parallel.pipeline) for model in models.values())
        except torch.OutOfMemoryError:
            if dist.get_world_size(parallel_state.get_model_parallel_group()) > 1:
                # The other ranks of this model wait for it in a collective, and would for ever.
                raise
            return 0

    return largest_microbatch(peak_of, run.data.microbatch_tokens, most, least_of_all_ranks(free_bytes()))


def peak_bytes(model: FrozenModel, microbatches: Sequence[Microbatch]) -> int:
    """The most bytes that a forward pass takes on the GPU beside what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.score(microbatches)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _speaks_for_replica() -> bool:
    """Whether this rank of the last pipeline stage is the one that writes; the others hold equal scores."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def _pairs(microbatch: Microbatch, scores_S: Tensor) -> list[tuple[int, Float32Array, Float32Array]]:
    """Dataset row, chosen and rejected scores of each pair of a microbatch."""
    spans_R = torch.bincount(microbatch.span_response.long(), minlength=microbatch.num_responses)
    responses = [part.cpu().numpy() for part in scores_S.split(spans_R.tolist())]
    return [
        (int(row), responses[chosen], responses[rejected])
        for row, chosen, rejected in zip(
            microbatch.pair_index.tolist(), microbatch.chosen.tolist(), microbatch.rejected.tolist(), strict=True
        )
    ]
