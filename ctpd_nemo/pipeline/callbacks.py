"""What happens beside the training loop: the metric log, the report on the data, stopping between shards."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from ctpd_nemo.data.encoded_pair import Skipped
from ctpd_nemo.data.loader import StepStats
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.data import FIRST_PAIRS, RunData, no_usable_pair
from ctpd_nemo.models.probe import take_probe
from ctpd_nemo.parallel.agreement import any_rank, any_rank_of_replica
from ctpd_nemo.pipeline.step_rows import StepRows
from ctpd_nemo.pipeline.stopping import StopRequest, stopped

logger = logging.getLogger(__name__)

# Of a report's counts, those by name; a checkpoint of before there were some has none of them.
_COUNTERS = ("skipped", "differing")


class DataReport(Callback):
    """Says at the end what was trained on and what was left out, earlier parts of a resumed run included."""

    def __init__(self, title: str, place: str, warn_skipped: float = 1.0) -> None:
        """Args:
        title: What the line begins with.
        place: The training data, to name in an error.
        warn_skipped: Share of skipped pairs above which a warning is given at once.
        """
        self.title = title
        self.place = place
        self.stats = StepStats()
        self._skips = SkipWarning(title, warn_skipped)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {**vars(self.stats), **{name: dict(getattr(self.stats, name)) for name in _COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        counters = {name: Counter(state_dict.get(name, {})) for name in _COUNTERS}
        self.stats = StepStats(**{**state_dict, **counters})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step.

        Raises:
            InputError: Every pair so far was skipped, and they are enough to say so, or all that there are.
        """
        self.stats += pl_module.last_stats
        self._skips.look(self.stats, batch.skipped)
        if pl_module.data_wait.steps == 1:
            logger.info("%-13s data of the first step after %.1f s", self.title, pl_module.data_wait.first_seconds)
        enough = min(FIRST_PAIRS, len(pl_module.run_data.train))
        over = trainer.global_step == trainer.max_steps
        if not self.stats.pairs and (over or self.stats.skipped.total() >= enough):
            raise no_usable_pair(self.place, self.stats.skipped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Report."""
        waited = f"{pl_module.data_wait.share:.2%} of step time spent waiting for data"
        logger.info("%-13s trained on %s; %s", self.title, self.stats, waited)


class ProbeRecord(Callback):
    """Writes down log-probs of the weights that training ends with, for an export to be compared with."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: Of the run.
        """
        self._folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take them; every rank takes part."""
        probe = take_probe(pl_module)
        if probe is not None and trainer.is_global_zero:
            probe.write(self._folder)


class SkipWarning:
    """Says at once that pairs are skipped: the first for each fault of a row, and once that they are too many."""

    def __init__(self, title: str, share: float) -> None:
        """Args:
        title: What lines begin with.
        share: Of skipped pairs, above which they are too many.
        """
        self._title = title
        self._share = share
        self._told: set[str] = set()
        self._warned = False

    def look(self, stats: StepStats, skipped: Sequence[Skipped]) -> None:
        """Look at what was left out.

        Args:
            stats: Of all steps so far.
            skipped: Of the last one, here.
        """
        for pair in skipped:
            if pair.why and pair.reason not in self._told:
                self._told.add(pair.reason)
                logger.warning("%s: skipped a pair (%s): %s", self._title, pair.reason, pair.why)
        left_out = stats.skipped.total()
        seen = stats.pairs + left_out
        # Of the first few one alone is a large share; so many that the next could not make it a small one are not.
        if not self._warned and left_out > self._share * max(seen, FIRST_PAIRS):
            self._warned = True
            logger.warning("%s: %d of the first %d pairs are skipped: %s", self._title, left_out, seen, stats)


class ScoreReport(Callback):
    """Says of a scoring job, shard by shard, that pairs are skipped."""

    def __init__(self, title: str, warn_skipped: float) -> None:
        """Args:
        title: What lines begin with.
        warn_skipped: Share of skipped pairs above which a warning is given at once.
        """
        self._skips = SkipWarning(title, warn_skipped)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the shard, and at what this replica has done so far."""
        self._skips.look(pl_module.stats, batch.skipped)


class DataWatch(Callback):
    """Stops a run whose data files are written to: looks when an epoch begins, and before a checkpoint is written."""

    def __init__(self, data: RunData) -> None:
        self._data = data
        self._epoch = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look where the step is of another epoch than the one before; every rank comes to it.

        Raises:
            InputError: A file has changed.
        """
        if batch.epoch != self._epoch:
            self._epoch = batch.epoch
            self._look()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Look before anything is written.

        Raises:
            InputError: A file has changed.
        """
        self._look()

    def _look(self) -> None:
        """All ranks stop for what one of them sees: they may have files of their own."""
        found: InputError | None = None
        try:
            self._data.check_unchanged()
        except InputError as error:
            found = error
        if any_rank(found is not None):
            seen: list[InputError | None] = [None] * dist.get_world_size()
            dist.all_gather_object(seen, found)
            raise next(error for error in seen if error is not None)


class StopBetweenShards(Callback):
    """Ends scoring after the shard that a replica is at, when the job was asked to stop."""

    def __init__(self) -> None:
        self._request = StopRequest()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to listen."""
        self._request.listen()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop; ranks of one replica come to the same end, and replicas to ends of their own."""
        if any_rank_of_replica(self._request.received):
            raise stopped("between two shards", any_rank_of_replica(self._request.interrupted))


class MetricLog(Callback):
    """Appends one JSON object a step to a file; rank 0 writes.

    A run that goes on from an earlier step drops the rows of steps it does again.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: The JSON-lines file, see ``StepRows``.
        """
        self._rows = StepRows(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Cut the log back to what is done; a step that was validated is validated again."""
        if trainer.is_global_zero:
            last = self._rows.cut_back(lambda row: _stays(row, trainer.global_step))
            if last is not None:
                _draw_again(trainer, last)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append the step's metrics."""
        row = {"step": trainer.global_step, **pl_module.last_metrics}
        if pl_module.last_weights:
            row["weights"] = pl_module.last_weights
        self._append(trainer, row)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Append the means over the held-out pairs."""
        self._append(trainer, {"step": trainer.global_step, **pl_module.last_validation})

    def _append(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self._rows.append(row)


def _draw_again(trainer: pl.Trainer, row: dict[str, Any]) -> None:
    """Give TensorBoard the last step that was done: it drops that one too, as its validation may be done again."""
    if row["step"] == trainer.global_step:
        values = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        for drawn in trainer.loggers:
            if isinstance(drawn, TensorBoardLogger):
                drawn.log_metrics(values, step=row["step"])


def _stays(row: dict[str, Any], step: int) -> bool:
    """Whether a row is of what was done before ``step`` steps, or of the last of these, and will not be done again."""
    return row["step"] < step or (row["step"] == step and not any(name.startswith("val_") for name in row))
