"""The paper's stages chained into one run that can be cut off and started again.

Each stage has a folder in the run folder, with ``stage.json``: a fingerprint of what the stage was computed from, and
whether it is complete. A complete stage whose fingerprint still holds is skipped. One that was cut off goes on from its
newest checkpoint or shard. One whose inputs have changed is done again; what it had made is moved aside, not deleted.
"""

import functools
import gc
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.distillation import DistillationConfig
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.hang import watch_for_hangs
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.pipeline.claim import claim
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.rank_zero import on_rank_0, on_rank_0_however_long, on_rank_0_in_parts
from ctpd_nemo.pipeline.recipe import Stage, check_roles, check_spans, check_top_k, find_stages, stage_values
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_cache import is_whole
from ctpd_nemo.pipeline.stage_checks import (
    StandingStage,
    check_reading,
    is_asked_for,
    output_of,
    put_folders_of_now,
)
from ctpd_nemo.pipeline.stage_status import (
    StageStatus,
    read_status,
    settings_fingerprint,
    stage_fingerprint,
    write_status,
)
from ctpd_nemo.pipeline.top_k_cache import top_k_is_whole
from ctpd_nemo.pipeline.train import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        output: The Hugging Face folder of a training stage, the cache of the scoring stage.
        seconds: Wall time when it was done, in this run or an earlier one.
        skipped: Whether it was complete before.
    """

    output: Path
    seconds: float
    skipped: bool


def run_pipeline(config: DictConfig) -> dict[str, StageResult]:
    """Run every stage that ``config.stages`` names, in the order of the recipe.

    Args:
        config: Values for all stages, and under ``stages.<name>`` those of one. A stage that is null is left out.

    Raises:
        InputError: A value, file or folder cannot be used.
    """
    config.run_dir = str(output_folder("run_dir", config.run_dir))
    stages = find_stages(config)
    known = [stage.name for stage in stages]
    for name in config.only or ():
        if name not in known:
            raise InputError("only", name, "a list of stages that are not null, of " + ", ".join(known))
    # The last one's turn comes days later.
    standing = _standing(config, stages)
    for one in standing:
        one.check()
    # What the libraries hold lives as long as the process; Megatron-Core searches it for garbage at every checkpoint.
    gc.collect()
    gc.freeze()
    set_deterministic(bool(config.get("deterministic")))
    # The first call makes the default group, and its limit of time is for good.
    initialize(ParallelConfig(timeout_minutes=config.parallel.timeout_minutes))
    watch_for_hangs(Path(config.run_dir), config.parallel.timeout_minutes)
    # In parts, not in a thread: in others than the main one nothing bounds what templates take.
    on_rank_0_in_parts(check_reading(standing))
    results: dict[str, StageResult] = {}
    fingerprints: dict[str, str] = {}
    settings: dict[str, str] = {}
    for stage in stages:
        asked_for = is_asked_for(config, stage)
        inputs = stage.builds_on(config)
        if not asked_for and not results.keys() >= set(inputs.values()):
            continue
        run = stage_config(config, stage, results)
        sources = {key: fingerprints[source] for key, source in inputs.items()}
        # Of weights, too: a hundred gigabytes and more.
        fingerprint = on_rank_0_however_long(functools.partial(stage_fingerprint, run, stage, sources))
        fingerprints[stage.name] = fingerprint
        said = {key: settings[source] for key, source in inputs.items()}
        settings[stage.name] = settings_fingerprint(run, stage, said)
        if asked_for:
            results[stage.name] = _run_stage(stage, run, StageStatus(fingerprint, settings[stage.name]))
        elif done := _complete(stage, run, fingerprint):
            results[stage.name] = done
        let_go()
    return results


def let_go() -> None:
    """Free what a stage has held: its model is a circle of references, on a GPU until somebody looks.

    A first pass leaves tensors behind that C++ has held until then.
    """
    for _ in range(2):
        gc.collect()


def _standing(config: DictConfig, stages: Sequence[Stage]) -> list[StandingStage]:
    """The stages that are asked for, with folders that are there now."""
    by_name, found = {stage.name: stage for stage in stages}, []
    for stage in stages:
        if is_asked_for(config, stage):
            # A stage that is null is missed where its output is asked for.
            sources = [by_name[name] for name in stage.builds_on(config).values() if name in by_name]
            results = {one.name: StageResult(output_of(config, one), 0.0, skipped=True) for one in sources}
            found.append(put_folders_of_now(config, by_name, stage, stage_config(config, stage, results)))
    return found


def stage_config(config: DictConfig, stage: Stage, results: Mapping[str, StageResult]) -> RunConfig:
    """The config of one stage: the common values, its own, and the outputs of the stages before it.

    Raises:
        InputError: A key or value cannot be used, a stage that this one builds on is not in ``results``, or no stage
            makes scores that it needs.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for name in ("only", "stages"):
        del values[name]
    merged = OmegaConf.merge(values, stage_values(config, stage), {"policy": stage.policy})
    assert isinstance(merged, DictConfig)
    merged.run_dir = str(Path(config.run_dir) / stage.name)
    for key, source in stage.builds_on(config).items():
        if source not in results:
            null = config.stages.get(source) is None
            found = "null" if null else f"nothing complete, from these inputs, in {config.run_dir}/{source}"
            raise InputError(f"stages.{source}", found, f"a stage that is done: {stage.name} builds on it")
        OmegaConf.update(merged, key, str(results[source].output), force_add=True)
    if stage.scores:
        OmegaConf.update(merged, "method.cache", str(Path(merged.run_dir) / "cache"), force_add=True)
    try:
        run = run_config(merged)
    except InputError as error:
        raise InputError(f"stage {stage.name}, {error.place}", error.found, error.expected) from error
    check_spans(config, stage)
    if isinstance(run.method, CTPDConfig):
        check_roles(config, stage, run.method)
    elif isinstance(run.method, DistillationConfig):
        check_top_k(config, stage, run.method)
    return run


def settings_of_stages(config: DictConfig, names: Collection[str]) -> dict[str, str]:
    """Of some stages the ``settings`` of their ``stage.json``, as a run of today would write them.

    Args:
        config: As of ``run_pipeline``.
        names: The stages; those that one builds on are among them.

    Raises:
        InputError: A value cannot be used.
    """
    stages = find_stages(config)
    inputs = {stage.name: StageResult(Path(config.run_dir) / stage.name, 0.0, skipped=True) for stage in stages}
    found: dict[str, str] = {}
    for stage in (one for one in stages if one.name in names):
        sources = {key: found[source] for key, source in stage.builds_on(config).items()}
        found[stage.name] = settings_fingerprint(stage_config(config, stage, inputs), stage, sources)
    return found


def _complete(stage: Stage, run: RunConfig, fingerprint: str) -> StageResult | None:
    """What a stage left, where it is complete and still good."""
    output = Path(run.run_dir) / stage.output
    status = on_rank_0(lambda: read_status(Path(run.run_dir)) if output.exists() else None)
    if status is None or status.fingerprint != fingerprint or not status.complete:
        return None
    if stage.scores and not on_rank_0(lambda: is_whole(output) and (not run.method.top_k or top_k_is_whole(output))):
        return None
    return StageResult(output, status.seconds, skipped=True)


def _run_stage(stage: Stage, run: RunConfig, begun: StageStatus) -> StageResult:
    """Run a stage, or what is left of it; ``begun`` is the status of one that has just begun."""
    folder, output = Path(run.run_dir), Path(run.run_dir) / stage.output
    if done := _complete(stage, run, begun.fingerprint):
        logger.info("%-13s skipped: complete, and nothing it depends on has changed", stage.name)
        on_rank_0(lambda: _renew_settings(folder, begun.settings))
        return done
    on_rank_0(lambda: claim(folder))
    goes_on = on_rank_0(lambda: _prepare(folder, begun))
    logger.info("%-13s %s", stage.name, "goes on where it was cut off" if goes_on else "begins")
    started = time.perf_counter()
    if stage.scores:
        score(run)
    else:
        checkpoint = train(run)
        # Asked once: a rank that looked later could find what rank 0 has exported by then, and not take part.
        if not on_rank_0(output.exists):
            export(ExportConfig(str(checkpoint), run.policy_side().path, str(output)))
    seconds = time.perf_counter() - started
    on_rank_0(lambda: write_status(folder, replace(begun, complete=True, seconds=seconds)))
    logger.info("%-13s done in %.0f s: %s", stage.name, seconds, output)
    return StageResult(output, seconds, skipped=False)


def _prepare(folder: Path, begun: StageStatus) -> bool:
    """Make a stage's folder ready; whether the stage was cut off and goes on."""
    status = read_status(folder)
    if status is not None and status.fingerprint != begun.fingerprint:
        aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
        folder.rename(aside)
        logger.info("%-13s inputs have changed: what it had made is now in %s", folder.name, aside)
        status = None
    if status != begun:
        write_status(folder, begun)
    return status is not None


def _renew_settings(folder: Path, settings: str) -> None:
    """The same files may have another name since."""
    status = read_status(folder)
    if status is not None and status.settings != settings:
        write_status(folder, replace(status, settings=settings))
