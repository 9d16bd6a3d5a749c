"""The Lightning strategy that leaves models, gradients and checkpoints to Megatron-Core."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core.transformer import MegatronModule

from ctpd_nemo.parallel import checkpoint as checkpoints
from ctpd_nemo.parallel.checkpoint_reader import reading
from ctpd_nemo.parallel.checkpoint_writer import CheckpointWriter
from ctpd_nemo.parallel.layout import ParallelConfig, initialize, local_device
from ctpd_nemo.parallel.optimizer import LightningOptimizer
from ctpd_nemo.parallel.ranks import JobEnvironment


class MegatronLightningModule(Protocol):
    """What the strategy asks of a Lightning module beside Lightning's own interface."""

    chunks: list[MegatronModule]

    def fingerprints(self) -> dict[str, str]:
        """What the run depends on, by name; written into checkpoints and compared on resume."""


class MegatronStrategy(DDPStrategy):
    """One process a GPU (or a CPU process with gloo), Megatron's process groups, distributed checkpoints.

    Lightning wraps, moves and averages nothing: the module builds its Megatron chunks in ``configure_model`` and steps
    Megatron's optimizer by hand.
    """

    def __init__(self, parallel: ParallelConfig, seed: int, devices: int, async_save: bool = False) -> None:
        """Args:
        parallel: The layout.
        seed: Seeds the random states of every rank.
        devices: Processes of this node.
        async_save: Write checkpoints while training goes on.
        """
        device = local_device()
        super().__init__(
            accelerator=None,
            parallel_devices=[
                torch.device(device.type, i) if device.type == "cuda" else device for i in range(devices)
            ],
            cluster_environment=JobEnvironment(),
        )
        self.parallel = parallel
        self.seed = seed
        self.writer = CheckpointWriter(async_save)

    def _configure_launcher(self) -> None:
        # The processes are there: torchrun started them, or there is just this one.
        self._launcher = None

    def setup_distributed(self) -> None:
        """Build the process groups; called by Lightning before ``configure_model``."""
        self.set_world_ranks()
        initialize(self.parallel, self.seed)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Nothing: models name their devices. Lightning would have all else that is made meanwhile on the GPU too."""
        yield

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up optimizers; model and data-parallel wrapper are there since ``configure_model``."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """Close what is open. Lightning would also copy the model to the host: on every rank, and for nobody."""
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            if part is not None:
                part.teardown()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: a checkpoint is read straight into the optimizer, which must exist by then."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights go through ``save_checkpoint`` in shards."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Empty: optimizer state goes through ``save_checkpoint`` in shards."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a distributed checkpoint folder; ``checkpoint`` is Lightning's state of loops and callbacks.

        Raises:
            SaveFailed: It could not be written.
        """
        module = self._module()
        trainer_state = {key: checkpoint[key] for key in ("epoch", "global_step", "loops", "callbacks")}
        fingerprints = {"layout": checkpoints.layout_name(), **module.fingerprints()}
        state = checkpoints.TrainState(trainer=trainer_state, fingerprints=fingerprints)
        checkpoints.save(filepath, module.chunks, self._optimizer(), state, self.writer)

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """Read a distributed checkpoint folder into the module and its optimizer; returns Lightning's part.

        That it belongs to the run is looked at before there is a model, see ``MegatronModel.check_fingerprints``.
        """
        state = checkpoints.load(checkpoint_path, self._module().chunks, self._optimizer())
        # The loader gives the steps that are left. Lightning is to count them from 0: counting on, it would take the
        # run's first part for an epoch that ends with the next step, and begin the loader anew.
        with reading(checkpoint_path):
            progress = state.trainer["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            progress["current"] = dict.fromkeys(progress["current"], 0)
            # It counts a step when its hooks have run, of which one saves: counting on, loggers would fall behind by
            # one.
            loop = state.trainer["loops"]["fit_loop"]["epoch_loop.state_dict"]
            loop["_batches_that_stepped"] = state.trainer["global_step"]
        return {
            **state.trainer,
            "state_dict": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "pytorch-lightning_version": pl.__version__,
        }

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: ``load_checkpoint`` has filled the model."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: ``load_checkpoint`` has filled the optimizer."""

    def _module(self) -> MegatronLightningModule:
        assert self.lightning_module is not None
        return self.lightning_module  # type: ignore[return-value]

    def _optimizer(self) -> LightningOptimizer | None:
        return self.optimizers[0] if self.optimizers else None  # type: ignore[return-value]
