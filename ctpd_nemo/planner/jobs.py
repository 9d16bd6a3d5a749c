"""What each stage of the recipe asks for: its models, its batches, its layout."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.distillation import DistillationConfig
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.models.roles import ROLES, by_model
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.models.weighted import WeightedConfig
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.pipeline.recipe import STAGES, Stage, find_stages, stage_values
from ctpd_nemo.pipeline.stages import StageResult, stage_config
from ctpd_nemo.planner.architecture import NamedArchitecture, find_architecture
from ctpd_nemo.planner.distillation import DistillationLoss


@dataclass(frozen=True)
class Layout:
    """How a job is cut up.

    Attributes:
        gpus: Processes of the job.
        parallel: Sizes within it.
        microbatch_tokens: Most tokens of a microbatch.
        held: Models that a scoring job holds at once, one pass over the data for each such group; ``None`` for all.
    """

    gpus: int
    parallel: ParallelConfig
    microbatch_tokens: int
    held: int | None = None

    @property
    def data_ranks(self) -> int:
        """Data-parallel size."""
        return self.gpus // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters."""
        return self.data_ranks * self.parallel.context

    @property
    def sequence_multiple(self) -> int:
        """What the tokens of a sequence are a multiple of (``models.data.RunData``)."""
        return 2 * self.parallel.context if self.parallel.context > 1 else 1

    def multiple(self, precision: PrecisionConfig) -> int:
        """What the tokens of a microbatch are a multiple of, beyond its sequences (``models.data.RunData``)."""
        if self.parallel.overlap_tensor:
            return self.microbatch_tokens
        return self.parallel.token_shares() * precision.token_multiple

    def __str__(self) -> str:
        p = self.parallel
        words = [f"tensor {p.tensor}", f"pipeline {p.pipeline}"]
        if p.virtual_pipeline:
            words.append(f"virtual {p.virtual_pipeline}")
        if p.context > 1:
            words.append(f"context {p.context}")
        words.append(f"data {self.data_ranks}")
        if p.sequence:
            words.append("sequence, overlapped" if p.overlap_tensor else "sequence")
        if p.recompute != "none":
            words.append(f"recompute {p.recompute}")
        if self.held is not None:
            words.append(f"{self.held} of the models at a time")
        return ", ".join(words) + f", {self.microbatch_tokens} tokens"


@dataclass(frozen=True)
class FrozenModels:
    """Models of one architecture that a job only scores with."""

    model: NamedArchitecture
    count: int
    side: str


@dataclass(frozen=True)
class Job:
    """One stage of the recipe.

    Attributes:
        name: Of the stage.
        method: The name of a method, or "score".
        model: What is trained; ``None`` in a scoring job.
        frozen: What is scored with.
        side: Whose tokens the trained model reads: "student" or "teacher".
        responses: Both of a pair, or the chosen one alone.
        precision: Number formats.
        pairs: Pairs of a step over all ranks; in a scoring job of a shard, which one replica does.
        max_length: Longest sequence.
        padding: "packed" or "padded".
        epochs: Passes over the pairs.
        max_steps: The most steps, ``None`` for all.
        parallel: The layout that the experiment names.
        microbatch_tokens: Likewise.
        attention: "fused" (Transformer Engine) or "local".
        together: Whether a scoring job must hold all its models at once, or one; ``None``: as many as fit.
        largest_budget: Whether a scoring job finds the token budget itself: the most that fit, from
            ``microbatch_tokens`` on.
        loss: That of distillation; ``None`` for one of log-probs.
    """

    name: str
    method: str
    model: NamedArchitecture | None
    frozen: tuple[FrozenModels, ...]
    side: str
    responses: tuple[str, ...]
    precision: PrecisionConfig
    pairs: int
    max_length: int
    padding: str
    epochs: int
    max_steps: int | None
    parallel: ParallelConfig
    microbatch_tokens: int
    attention: str
    together: bool | None = True
    largest_budget: bool = False
    loss: DistillationLoss | None = None

    @property
    def models(self) -> list[NamedArchitecture]:
        """All models of the job."""
        return ([self.model] if self.model else []) + [frozen.model for frozen in self.frozen]

    def given_layout(self, gpus: int) -> Layout:
        """The layout of the experiment on so many GPUs."""
        return Layout(gpus, self.parallel, self.microbatch_tokens)

    def alike(self) -> "Job":
        """The same without its name: stages that cost the same are planned once."""
        return replace(self, name="")


def find_jobs(config: DictConfig, attention: str = "fused") -> list[Job]:
    """The jobs of an experiment, in the order of the recipe.

    Args:
        config: That of ``pipeline.stages.run_pipeline``.
        attention: "fused" or "local".

    Raises:
        InputError: A value or model cannot be used.
    """
    jobs = []
    stages = find_stages(config)
    inputs = {stage.name: StageResult(Path(config.run_dir) / stage.name, 0.0, skipped=True) for stage in stages}
    for stage in stages:
        if config.only is None or stage.name in config.only:
            jobs.append(replace(_job(config, stage_values(config, stage), stage, inputs), attention=attention))
    if not jobs:
        raise InputError("stages", "none to plan", "one or more of " + ", ".join(stage.name for stage in STAGES))
    return jobs


def _job(config: DictConfig, own: Mapping[str, Any], stage: Stage, inputs: Mapping[str, StageResult]) -> Job:
    run = stage_config(config, stage, inputs)
    run.optim.check()
    run.data.check()
    run.trainer.check()
    run.precision.check()
    # A stage that builds on another has that one's output for a path; what it began with tells the sizes.
    models = OmegaConf.merge(config.model, own.get("model") or {})
    paths = {side: OmegaConf.select(models, f"{side}.path") for side in ("student", "teacher")}
    sides = {side: find_architecture(path, f"model.{side}") for side, path in paths.items() if path}
    for model in sides.values():
        longest = model.architecture.max_position_embeddings
        if run.data.max_length > longest:
            raise InputError("data.max_length", str(run.data.max_length), f"at most {model.name}'s {longest} positions")
    if isinstance(run.method, ScoreConfig):
        return _scoring_job(run, stage.name, sides)
    method = METHODS[run.method.name]
    roles: Iterable[str] = ()
    if getattr(run.method, "reference", None) == "online":
        roles = run.method.roles() if isinstance(run.method, WeightedConfig) else ("reference",)
    return Job(
        model=_side(sides, run.policy),
        frozen=_frozen(roles, sides, run.policy, method.two_sided),
        side=run.policy,
        responses=method.responses,
        pairs=run.data.global_batch_size,
        loss=_distillation_loss(config, run.method, sides) if isinstance(run.method, DistillationConfig) else None,
        **_common(run, stage.name),
    )


def _distillation_loss(
    config: DictConfig, method: DistillationConfig, sides: Mapping[str, NamedArchitecture]
) -> DistillationLoss:
    teacher = _side(sides, "teacher").architecture if method.reference == "online" else None
    top_k = getattr(method, "top_k", None)
    if top_k is None and teacher is None:
        # As many as the cache will have.
        top_k = OmegaConf.select(config, "stages.score.method.top_k")
        if top_k is None:
            raise InputError(f"method.top_k of {method.name}", "null, with a cache of another run", "a number")
    return DistillationLoss(method.name, _side(sides, "student").architecture, teacher, top_k)


def _side(sides: Mapping[str, NamedArchitecture], side: str) -> NamedArchitecture:
    if side not in sides:
        raise InputError(f"model.{side}.path", "nothing", "a model folder, or the name of a known model")
    return sides[side]


def _frozen(
    roles: Iterable[str], sides: Mapping[str, NamedArchitecture], policy: str, two_sided: bool
) -> tuple[FrozenModels, ...]:
    """The models of some roles, by whose tokens they read."""
    reads = {"policy": policy, "reference": "teacher" if two_sided else policy}
    count = Counter(reads[ROLES[name].side] for name in by_model(roles))
    return tuple(FrozenModels(_side(sides, side), number, side) for side, number in count.items())


def _scoring_job(run: RunConfig, name: str, sides: Mapping[str, NamedArchitecture]) -> Job:
    method = run.method
    frozen = _frozen(method.folders(), sides, run.policy, method.two_sided(run.policy))
    job = Job(
        model=None,
        frozen=frozen,
        side=frozen[0].side,
        responses=("chosen", "rejected"),
        pairs=method.pairs_per_shard,
        **_common(run, name),
    )
    return replace(
        job,
        microbatch_tokens=method.microbatch_tokens or run.data.microbatch_tokens,
        together=method.together,
        largest_budget=method.microbatch_tokens is None,
    )


def _common(run: RunConfig, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "method": run.method.name,
        "precision": run.precision,
        "max_length": run.data.max_length,
        "padding": run.data.packing,
        "epochs": run.trainer.epochs,
        "max_steps": run.trainer.max_steps,
        "parallel": run.parallel,
        "microbatch_tokens": run.data.microbatch_tokens,
        "attention": "fused",
    }
