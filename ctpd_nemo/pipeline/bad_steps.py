"""What becomes of steps whose loss or gradient is not finite: their pairs are written down; too many end the run."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state

from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.bad_steps import BadSteps
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.parallel.checkpoint_writer import SaveFailed
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.step_rows import StepRows

logger = logging.getLogger(__name__)


class BadStepReport(Callback):
    """Counts bad steps over all parts of a run; comes before ``Checkpointing``, which may end the job at one.

    Each has a row in a JSON-lines file: ``step``, ``loss`` and ``grad_norm`` as text ("nan", "inf"), and
    ``microbatches``, of all data-parallel ranks, each with the ids of its ``pairs``, their ``places`` in the data and
    their mean ``loss``.
    """

    def __init__(self, folder: Path, max_in_a_row: int) -> None:
        """Args:
        folder: The run folder; it holds ``checkpoints``, and gets ``bad_batches.jsonl``.
        max_in_a_row: How many bad steps in a row end the run.
        """
        self.folder = folder
        self.max_in_a_row = max_in_a_row
        self.counts = BadSteps()
        self._rows = StepRows(folder / "bad_batches.jsonl")

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return vars(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.counts = BadSteps(**state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let the model count on, and drop rows of steps that will be done again."""
        pl_module.bad_steps = self.counts
        if trainer.is_global_zero:
            self._rows.cut_back(lambda row: row["step"] <= trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write down a bad step.

        Raises:
            InputError: There were too many in a row, or nothing else in the whole run.
        """
        if not self.counts.in_a_row:
            return
        step = trainer.global_step
        loss, norm = (str(pl_module.last_metrics[name]) for name in ("loss", "grad_norm"))
        microbatches = _all_microbatches(pl_module, batch)
        if trainer.is_global_zero:
            self._rows.append({"step": step, "loss": loss, "grad_norm": norm, "microbatches": microbatches})
        logger.warning(
            "%s: step %d changes no weights: loss %s, norm of the gradient %s; its pairs are in %s",
            self.folder.name,
            step,
            loss,
            norm,
            self._rows.path,
        )
        if self.counts.in_a_row >= min(self.max_in_a_row, trainer.max_steps):
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        # One that is still being written is the last good one, or failed: then that before is.
        with contextlib.suppress(SaveFailed):
            trainer.strategy.writer.finish(wait=True)  # type: ignore[attr-defined]
        good = on_rank_0(lambda: find_checkpoints(self.folder / "checkpoints"))
        newest = f"training goes on from {good[-1]}" if good else "there is no checkpoint yet"
        count = self.counts.in_a_row
        found = f"no finite loss and gradient in {count} step{'s' * (count > 1)} in a row"
        raise InputError(
            f"{self.folder}, step {trainer.global_step}",
            f"{found}, of the pairs in {self._rows.path}",
            f"fewer than trainer.max_bad_steps; are weights, data and rates sound? Started again, {newest}",
        )


def _all_microbatches(model: Any, batch: StepBatch) -> list[dict[str, Any]]:
    """Pair ids and loss of the microbatches of all data-parallel ranks; every rank calls it together."""
    own: list[dict[str, Any]] = []
    first_of_stage = not (parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank())
    if first_of_stage and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for microbatch, loss in zip(batch.microbatches, model.last_losses, strict=True):
            if rows := microbatch.pair_index.tolist():
                mean = float(loss.sums["loss"]) / max(1.0, float(loss.counts["loss"]))
                train = model.run_data.train
                ids, places = [train[row].id for row in rows], [train.place(row) for row in rows]
                own.append({"pairs": ids, "places": places, "loss": str(mean)})
    of_ranks: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    return [microbatch for of_rank in of_ranks for microbatch in of_rank]
