"""This project's sides: whole training jobs as ``tools/train.py`` runs them, with one callback more."""

from typing import Any

from lightning.pytorch.callbacks import Callback
from turns import Turn

from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.dpo import DPOConfig
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.train import train
from side_by_side.setting import BETA, Setting
from side_by_side.world import ctpd_scores, dpo_scores, run_config


class TakeTurns(Callback):
    """Ends a turn with every step."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is set up."""
        self.turn()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is done."""
        metrics = pl_module.last_metrics
        names = ("loss", "logprob_chosen", "logprob_rejected", "cross_entropy", "distillation", "step_seconds")
        self.turn(**{name: metrics[name] for name in names if name in metrics})


def dpo_cached(turn: Turn, setting: Setting) -> None:
    """DPO from a score cache of the student's starting weights."""
    _train(turn, setting, DPOConfig(beta=BETA, reference="cache", scores=dpo_scores(setting)))


def ctpd_cached(turn: Turn, setting: Setting) -> None:
    """CTPD from a score cache of the three teachers."""
    _train(turn, setting, CTPDConfig(beta=BETA, reference="cache", scores=ctpd_scores(setting)))


def ctpd_online(turn: Turn, setting: Setting) -> None:
    """CTPD with the three teachers beside the student."""
    folders = {role: str(setting.teacher(role)) for role in ("positive", "negative")}
    _train(turn, setting, CTPDConfig(beta=BETA, reference="online", **folders))


def _train(turn: Turn, setting: Setting, method: Any) -> None:
    train_in_turns(turn, run_config(setting, method))


def train_in_turns(turn: Turn, run: RunConfig) -> None:
    """A whole training job that ends a turn with every step."""
    quiet.after_imports()
    train(run, callbacks=[TakeTurns(turn)])
