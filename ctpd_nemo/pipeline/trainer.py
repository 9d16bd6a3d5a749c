"""Lightning's trainer and NeMo's experiment manager, as every job here uses them."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.exp_manager import exp_manager

from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.parallel.ranks import read_ranks
from ctpd_nemo.parallel.strategy import MegatronStrategy
from ctpd_nemo.pipeline.places import Places
from ctpd_nemo.pipeline.progress import ProgressBar, ProgressLines
from ctpd_nemo.pipeline.tensorboard import LastingTensorBoard
from ctpd_nemo.pipeline.wandb_run import WandbRun, begin, wandb_arguments


def build_trainer(
    run: RunConfig, total_steps: int, callbacks: Sequence[Callback] = (), done_steps: int = 0
) -> pl.Trainer:
    """A trainer over the processes of this job, logging to ``logs`` in ``run.run_dir``.

    Args:
        run: The configuration.
        total_steps: Optimizer steps; validation falls on the last where ``validate_every`` is 0.
        callbacks: Beside the progress bar.
        done_steps: Steps that are done. What TensorBoard has of later ones is dropped, as they are done again; and what
            it has of the last of these, which may be validated again. A run that is done draws nothing again.
    """
    ranks = read_ranks()
    processes = ranks.local_world_size
    logs = Path(run.run_dir).absolute() / "logs"
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=processes,
        num_nodes=ranks.world_size // processes,
        strategy=MegatronStrategy(run.parallel, run.seed, processes, run.trainer.async_save),
        max_steps=total_steps,
        max_epochs=-1,
        val_check_interval=run.trainer.validate_every or max(1, total_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=run.trainer.log_every,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),  # ours, see below
        use_distributed_sampler=False,
        # Lightning would take this mode with NCCL alone.
        inference_mode=False,
        callbacks=[Places(), *callbacks, WandbRun(), *_progress(run)],
    )
    exp_manager(
        trainer,
        {
            # A folder of its own: NeMo moves every file that it finds there into run_0, run_1, ...
            "explicit_log_dir": str(logs),
            "create_tensorboard_logger": False,  # ours, see below
            **wandb_arguments(run, logs),
            # Distributed checkpoints and their resumption are this project's own.
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            # It would leave out the first validation that falls due after going on, whichever step that is.
            "disable_validation_on_resume": False,
            "log_step_timing": False,
            "seconds_to_sleep": 0,
        },
    )
    purge = done_steps if done_steps < total_steps else None
    drawn = LastingTensorBoard(save_dir=str(logs), name="", version="", default_hp_metric=False, purge_step=purge)
    trainer.loggers = [drawn, *trainer.loggers]
    if run.trainer.wandb:
        begin(trainer)
    return trainer


def _progress(run: RunConfig) -> list[Callback]:
    """A bar on a terminal, lines in a log file."""
    title = Path(run.run_dir).name
    return [ProgressBar(title) if sys.stderr.isatty() else ProgressLines(title)]
