"""What every trained model shares: building, weights, steps, metrics, and Lightning's hooks."""

import dataclasses
import logging
import math
import time
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf
from torch import Tensor

from ctpd_nemo.convert.load import load_hf_weights
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch, StepStats
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.bad_steps import BadSteps
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.data_wait import DataWait
from ctpd_nemo.models.folder import check_model
from ctpd_nemo.models.forward import (
    OutputReader,
    StepLoss,
    equal_microbatches,
    mean_metrics,
    run_microbatches,
    span_logprobs,
    sum_over_data_parallel,
)
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import local_device
from ctpd_nemo.parallel.optimizer import LightningOptimizer, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.userbuffers import prepare_userbuffers

logger = logging.getLogger(__name__)

# Values of a method's config that name a folder.
FOLDERS = ("scores", "student_scores", "positive", "negative", "student_positive", "student_negative")

# Metrics of every method: pairs that were skipped, and responses that were cut.
LEFT_OUT = ("skipped", "truncated")


class MegatronModel(ModelPT):
    """A NeMo model around Megatron-Core GPT chunks, trained by Megatron's schedules and optimizer.

    A subclass is a method: it says which responses of a pair it trains on and what loss a microbatch has.

    Attributes:
        metric_names: What ``microbatch_loss`` reports, in a fixed order.
        shown_metrics: Those of them that the progress bar shows.
        run: The configuration.
        run_data: Datasets, encoder and loaders.
        last_metrics: Of the last training step, means over its global batch.
        last_losses: Its losses by microbatch, on the last pipeline stage; empty on the others.
        last_weights: Histogram of that step's span weights, see ``weight_histogram``.
        last_stats: What went into that step, and what was left out of it.
        last_validation: Of the last pass over the held-out pairs.
        data_wait: How long steps have waited for their data.
        failed_checkpoints: How many could not be written since this process began.
        bad_steps: Those that changed no weights, as their loss or gradient was not finite.
    """

    metric_names: ClassVar[tuple[str, ...]]
    shown_metrics: ClassVar[tuple[str, ...]]

    def __init__(self, run: RunConfig, run_data: RunData, trainer: Trainer | None = None) -> None:
        """Args:
        run: The configuration; it becomes NeMo's ``cfg`` under the key ``run``.
        run_data: Where batches come from.
        trainer: Lightning's trainer with a ``MegatronStrategy``.
        """
        super().__init__(OmegaConf.create({"run": dataclasses.asdict(run)}), trainer)
        self.automatic_optimization = False
        self.run = run
        self.run_data = run_data
        self.architecture = check_model(run_data.policy_path, run_data.policy, run)
        self._chunks = torch.nn.ModuleList()
        self.last_metrics: dict[str, float] = {}
        self.last_losses: list[StepLoss] = []
        self.last_weights: dict[str, dict[str, int]] = {}
        self.last_stats = StepStats()
        self.data_wait = DataWait(starting=max(1, run.data.num_workers))
        self.last_validation: dict[str, float] = {}
        self.failed_checkpoints = 0
        self.bad_steps = BadSteps()
        self._validation: list[StepLoss] = []
        self._validation_stats = StepStats()

    @abstractmethod
    def microbatch_loss(self, policy_S: Tensor, microbatch: Microbatch) -> StepLoss:
        """The loss of one microbatch, computed on the last pipeline stage.

        Args:
            policy_S: Log-prob of each span under the policy, fp32 ``[num_spans]``, or what else ``read_output`` gives.
            microbatch: The rest: weights, reference, pairs, and which response each span is of.
        """

    @property
    def read_output(self) -> OutputReader:
        """What a loss is made of: log-probs of spans, unless a method needs more of the model's output."""
        return span_logprobs

    def prepare_step(self, batch: StepBatch) -> None:
        """Fill in what a method computes as it goes: the scores of an online reference."""

    def weight_histogram(self, batch: StepBatch) -> dict[str, dict[str, int]]:
        """Counts of span weights of a global batch, see ``losses.histogram``; empty where nothing is weighed."""
        return {}

    # Building

    @property
    def chunks(self) -> list[Any]:
        """This rank's model chunks in their data-parallel wrappers."""
        return list(self._chunks)

    def configure_model(self) -> None:
        """Build this rank's chunks and read its weights; Lightning calls it when the process groups are there."""
        if len(self._chunks):
            return
        tokens, width = self.run.data.microbatch_tokens, self.architecture.hidden_size
        prepare_userbuffers(self.run.parallel, self.run.precision, tokens, width)
        gpt = build_gpt(self.architecture, self.run.parallel, self.run.precision)
        load_hf_weights(gpt, self.run_data.policy_path, self.architecture)
        self.extend(gpt)
        self._chunks.extend(wrap_data_parallel(gpt, self.run.parallel))

    def extend(self, chunks: list[GPTModel]) -> None:
        """Add what a method trains beside the model, before the data-parallel wrappers; it is left out of exports."""

    def learning_rates(self) -> dict[str, float]:
        """Learning rates after warm-up of parameters that have their own, by a pattern of their names."""
        return {}

    def configure_optimizers(self) -> LightningOptimizer:  # type: ignore[override]
        """Megatron's AdamW and schedule over all steps of the run."""
        steps, own_rates = self.run_data.total_steps, self.learning_rates()
        return LightningOptimizer(*build_optimizer(self.chunks, self.run.optim, self.run.parallel, steps, own_rates))

    # Data

    @classmethod
    def list_available_models(cls) -> None:
        """None: weights come from Hugging Face folders."""

    def setup_training_data(self, train_data_config: Any = None) -> None:
        """Make the loader of this rank's steps, from the step that training has reached."""
        self._train_dl = self.run_data.train_loader(*_data_parallel(), start_step=self.trainer.global_step)

    def setup_validation_data(self, val_data_config: Any = None) -> None:
        """Make the loader of this rank's held-out pairs."""
        self._validation_dl = self.run_data.validation_loader(*_data_parallel())

    def train_dataloader(self) -> Any:
        """The steps still to do."""
        self.setup_training_data()
        return self._train_dl

    def val_dataloader(self) -> Any:
        """Held-out pairs; an empty list where there are none."""
        self.setup_validation_data()
        return self._validation_dl or []

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Move the microbatches of a step."""
        batch.microbatches = [microbatch.to(device) for microbatch in batch.microbatches]
        batch.reference_microbatches = [microbatch.to(device) for microbatch in batch.reference_microbatches]
        batch.top_k = [top_k.to(device) for top_k in batch.top_k]
        return batch

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint of this run must match to be resumed from."""
        # Folders may move; weights and score caches are compared by their content.
        values = {key: value for key, value in vars(self.run.method).items() if key not in FOLDERS}
        return {
            "method": repr(values),
            "optim": repr(vars(self.run.optim)),
            "steps": str(self.run_data.total_steps),
            "precision": self.run.precision.name,
            **self.run_data.fingerprints(),
        }

    def check_fingerprints(self, saved: dict[str, str]) -> None:
        """Stop where a checkpoint was trained on something else that ``resume.allow`` does not name.

        Raises:
            InputError: Names the first thing that differs, or a name in ``resume.allow`` that is none.
        """
        fingerprints, allowed = self.fingerprints(), self.run.resume.allow
        groups = {name: name.rpartition("_")[2] for name in fingerprints}
        for name in allowed:
            if name not in (*groups, *groups.values()):
                known = ", ".join(dict.fromkeys((*groups, *groups.values())))
                raise InputError("resume.allow", repr(name), f"names of what may differ: {known}")
        for name, value in fingerprints.items():
            if saved.get(name) == value:
                continue
            place, before = f"{self.run.run_dir}, resume, {name}", saved.get(name)
            if not {name, groups[name]} & set(allowed):
                raise InputError(place, str(value), f"what the checkpoint was trained on: {before}")
            logger.warning(
                "%s: %s, where the checkpoint was trained on %s: allowed by resume.allow", place, value, before
            )

    # Steps

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step over one global batch."""
        started = time.perf_counter()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        learning_rate = optimizer.lr
        self.last_losses = self._run(batch, forward_only=False)
        metrics = mean_metrics(self.last_losses, self.metric_names, local_device())
        optimizer.step(sound=math.isfinite(metrics["loss"]))
        self.bad_steps.add(not optimizer.updated)
        self.last_weights = self.weight_histogram(batch)
        self.last_stats = sum_over_data_parallel(batch.stats, local_device())
        seconds = time.perf_counter() - started
        self.last_metrics = {
            **metrics,
            "lr": learning_rate,
            "grad_norm": optimizer.grad_norm,
            "tokens": float(self.last_stats.tokens),
            **_left_out(self.last_stats),
            "failed_checkpoints": float(self.failed_checkpoints),
            "bad_steps": float(self.bad_steps.total),
            "step_seconds": seconds,
            "tokens_per_second": self.last_stats.tokens / seconds,
            "data_wait_seconds": self.data_wait.add(batch.wait_seconds, seconds),
            "data_wait_share": self.data_wait.share,
        }
        # Lightning's name for where loggers put a point; it would count from 0.
        self.log("step", float(self.trainer.global_step))
        for name, value in self.last_metrics.items():
            self.log(name, value, prog_bar=name in (*self.shown_metrics, "tokens_per_second"))

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Losses and metrics of held-out pairs, forward only."""
        self._validation += self._run(batch, forward_only=True)
        self._validation_stats += batch.stats

    def on_validation_epoch_end(self) -> None:  # type: ignore[override]
        """Log the means over all held-out pairs."""
        metrics = mean_metrics(self._validation, self.metric_names, local_device())
        metrics |= _left_out(sum_over_data_parallel(self._validation_stats, local_device()))
        self._validation.clear()
        self._validation_stats = StepStats()
        self.last_validation = {f"val_{name}": value for name, value in metrics.items()}
        self.log_dict({**self.last_validation, "step": float(self.trainer.global_step)})

    def _run(self, batch: StepBatch, forward_only: bool) -> list[StepLoss]:
        device = local_device()
        batch.microbatches = equal_microbatches(batch.microbatches, self.run_data.filler, device)
        if batch.reference_microbatches:
            missing = len(batch.microbatches) - len(batch.reference_microbatches)
            batch.reference_microbatches += [self.run_data.filler("reference").to(device) for _ in range(missing)]
        self.prepare_step(batch)
        vocab_size = self.architecture.vocab_size
        return run_microbatches(
            self.chunks, batch.microbatches, vocab_size, self.microbatch_loss, forward_only, device, self.read_output
        )


def _left_out(stats: StepStats) -> dict[str, float]:
    """Pairs that were skipped and responses that were cut, as metrics."""
    skipped, truncated = LEFT_OUT
    return {skipped: float(stats.skipped.total()), truncated: float(stats.truncated)}


def _data_parallel() -> tuple[int, int]:
    """Rank and size of the group whose ranks see different pairs."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
