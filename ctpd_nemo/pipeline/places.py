"""Which part of a job a rank has come to, for the watch over ranks that hang."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.parallel import hang


class Places(Callback):
    """Says it at every step, validation and shard."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Its data is there."""
        hang.at(f"step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What is left of it is writing, and waiting for the next."""
        hang.at(f"the end of step {trainer.global_step}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Between two steps."""
        hang.at(f"the validation after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The last checkpoint."""
        hang.at("the end of training")

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A shard of scores."""
        hang.at(f"shard {batch.step}")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """No shard is left for this replica."""
        hang.at("the end of scoring")
