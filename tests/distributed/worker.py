"""Run by ``launch`` in every process of a job: train and score as the tools do, and write down what is computed.

Argument: a JSON file with a list of jobs, each a dict of

- ``run``: the values of a ``RunConfig``; ``run_dir`` is where everything goes.
- ``gradients``: after which steps (from 0) this rank's share of the gradients is written down.
- ``weights``: before which steps its share of the weights is.
- ``stop``: how many steps are done of those that the run was planned for; ``kill``: likewise, and the processes end by
  SIGKILL in the middle of the next.
- ``export``: whether the newest checkpoint is exported to ``run_dir/export``.

Every rank writes ``run_dir/observed-<rank>.pt``: ``microbatches``, a list of the dataset rows in each microbatch for
every training step, and ``gradients`` and ``weights``, which map a step to a list of blocks of Hugging Face tensors
``(name, (first row, last row), (first column, last column) or None, values)``.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from omegaconf import OmegaConf
from torch import Tensor

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.convert.layout import is_vocabulary, shard_blocks
from ctpd_nemo.convert.load import chunk_parameters
from ctpd_nemo.losses.dskd import PROJECTORS
from ctpd_nemo.models import base
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline import train as train_module
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.score import score

Blocks = list[tuple[str, tuple[int, int], tuple[int, int] | None, Tensor]]


class Observer:
    """Stands before ``run_microbatches`` and writes down what goes in and what is in the gradient buffers behind it."""

    def __init__(self, job: dict[str, Any], run: RunConfig) -> None:
        self.job = job
        self.architecture = read_architecture(run.policy_side().path)
        self.microbatches: list[list[list[int]]] = []
        self.gradients: dict[int, Blocks] = {}
        self.weights: dict[int, Blocks] = {}

    def wrap(self, run_microbatches: Callable[..., Any]) -> Callable[..., Any]:
        def observed(
            chunks: Any, microbatches: Any, vocab_size: int, evaluate: Any, forward_only: bool, *others: Any
        ) -> Any:
            if forward_only:
                return run_microbatches(chunks, microbatches, vocab_size, evaluate, forward_only, *others)
            step = len(self.microbatches)
            if step in self.job.get("weights", []):
                self.weights[step] = self.shares(chunks, lambda parameter: parameter.data)
            self.microbatches.append([microbatch.pair_index.tolist() for microbatch in microbatches])
            result = run_microbatches(chunks, microbatches, vocab_size, evaluate, forward_only, *others)
            if step == self.job.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if step in self.job.get("gradients", []):
                gather_gradients(chunks)
                self.gradients[step] = self.shares(chunks, lambda parameter: parameter.main_grad)
            return result

        return observed

    def shares(self, chunks: Sequence[DistributedDataParallel], values: Callable[[Any], Tensor]) -> Blocks:
        """This rank's parameters cut into blocks of Hugging Face tensors."""
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        blocks: Blocks = []
        for chunk in chunks:
            for name, parameter in chunk_parameters(chunk.module).items():
                share, at = values(parameter), 0
                if name.startswith(PROJECTORS):
                    blocks.append((name, (0, len(share)), None, share.clone()))
                    continue
                padded = len(share) * size if is_vocabulary(name) else None
                for block in shard_blocks(name, self.architecture, rank, size, padded):
                    rows = block.rows[1] - block.rows[0]
                    blocks.append((block.tensor, block.rows, block.columns, share[at : at + rows].clone()))
                    at += rows
                assert not share[at:].any(), "rows that pad the vocabulary are not zero"
        return blocks


def gather_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Under the distributed optimizer each data-parallel rank holds one share of the reduced gradients; join them."""
    for chunk in chunks:
        for buffer in chunk.buffers:
            if buffer.ddp_config.use_distributed_optimizer:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


class Stop(Callback):
    """Ends training after some of its steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.should_stop = True


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    run_microbatches, build_trainer = base.run_microbatches, train_module.build_trainer

    def with_stop(run: RunConfig, total_steps: int, callbacks: list[Callback], done_steps: int) -> Trainer:
        stop = Stop(observer.job.get("stop", total_steps))
        return build_trainer(run, total_steps, [*callbacks, stop], done_steps)

    base.run_microbatches, train_module.build_trainer = observer.wrap(run_microbatches), with_stop
    try:
        yield
    finally:
        base.run_microbatches, train_module.build_trainer = run_microbatches, build_trainer


def do(job: dict[str, Any]) -> None:
    run = run_config(OmegaConf.create(job["run"]))
    if run.method.name == "score":
        score(run)
        return
    observer = Observer(job, run)
    with observing(observer):
        checkpoint = train_module.train(run)
    observed = {name: getattr(observer, name) for name in ("microbatches", "gradients", "weights")}
    torch.save(observed, Path(run.run_dir) / f"observed-{dist.get_rank()}.pt")
    if job.get("export"):
        export(ExportConfig(str(checkpoint), run.policy_side().path, f"{run.run_dir}/export"))


def main() -> None:
    quiet.after_imports()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        do(job)
        if dist.get_rank() == 0:
            print("done", job["run"]["run_dir"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
