"""Encoding ahead of a pipeline, as a job without its models."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.hang import watch_for_hangs
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.pipeline.config import typed
from ctpd_nemo.pipeline.encoded import use_encoded
from ctpd_nemo.pipeline.preflight import check_outputs, is_two_sided
from ctpd_nemo.pipeline.recipe import Stage, find_stages
from ctpd_nemo.pipeline.stage_checks import is_asked_for
from ctpd_nemo.pipeline.stages import StageResult, stage_config

logger = logging.getLogger(__name__)


def encode(config: DictConfig) -> list[Path]:
    """Build the encoded datasets that the stages of a pipeline read, ahead of it and without its models.

    Args:
        config: That of ``run_pipeline``; the stages that are not null, and named by ``only``, say what is read how.

    Returns:
        The folders, each once.

    Raises:
        InputError: A value, file or tokenizer cannot be used.
    """
    config.run_dir = str(output_folder("run_dir", config.run_dir))
    minutes = typed(ParallelConfig, config.parallel, "parallel").timeout_minutes
    runs = [_run_of(config, stage) for stage in find_stages(config) if is_asked_for(config, stage)]
    for run in runs:
        if run.data.encoded is None:
            raise InputError("data.encoded", "null", "auto, or a folder for the encoded datasets")
        check_outputs(run)
    initialize(ParallelConfig(timeout_minutes=minutes))
    watch_for_hangs(Path(config.run_dir), minutes)
    folders: list[Path] = []
    for run in runs:
        data = RunData(run, ("chosen", "rejected"), is_two_sided(run))
        data.warn_of_choices()
        use_encoded(data)
        folders += [encoded.folder for encoded in data.encoded.values() if encoded.folder not in folders]
    logger.info("encoded: %s", ", ".join(map(str, folders)))
    return folders


def _run_of(config: DictConfig, stage: Stage) -> RunConfig:
    """The config of a stage whose models read as those that the first stages begin with."""
    sources = stage.builds_on(config).values()
    before = {name: StageResult(Path(config.run_dir) / name, 0.0, skipped=True) for name in sources}
    run = stage_config(config, stage, before)
    for side in ("student", "teacher"):
        if f"model.{side}.path" in stage.inputs:
            getattr(run.model, side).path = config.model[side].path
    return run
