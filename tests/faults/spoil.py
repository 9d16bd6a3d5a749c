"""Numbers that go wrong in one rank at chosen steps, and ranks that never come back.

``install`` is given, each a list of pairs of a step (from 1) and a rank:

- ``losses``: the loss of the first microbatch that the rank computes is NaN, and its gradient with it.
- ``gradients``: the reduced gradient that the rank holds is infinite; the loss is as it was.
- ``sleeps``: the rank sleeps for ever, before the step's first collective.
- ``naps``: likewise, for three seconds.

and ``omitted``, steps whose update is left out on every rank though nothing is wrong. Every rank writes a line a step
to ``digests-<rank>.jsonl``: the step, and digests of its weights and moments before and after.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ctpd_nemo.models import base
from ctpd_nemo.parallel.optimizer import LightningOptimizer


def install(plan: dict[str, Any], rank: int, folder: Path) -> None:
    """Change the classes of this process."""
    step = 0
    run_microbatches, training_step, update = (
        base.run_microbatches,
        base.MegatronModel.training_step,
        LightningOptimizer.step,
    )

    def due(kind: str) -> bool:
        return [step, rank] in plan.get(kind, [])

    def observed_step(model: Any, batch: Any, batch_idx: int) -> None:
        nonlocal step
        step = batch.step + 1
        if due("sleeps"):
            _sleep()
        if due("naps"):
            time.sleep(3)
        before = _digest(model)
        training_step(model, batch, batch_idx)
        with (folder / f"digests-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, before, _digest(model)]) + "\n")

    def spoilt_run(chunks: Any, microbatches: Any, vocab: int, evaluate: Any, forward_only: bool, *others: Any) -> Any:
        first = True

        def spoilt_loss(*arguments: Any) -> Any:
            nonlocal first
            loss = evaluate(*arguments)
            if first and due("losses") and not forward_only:
                loss.total = loss.total * math.nan
                loss.sums["loss"] = loss.sums["loss"] * math.nan
            first = False
            return loss

        result = run_microbatches(chunks, microbatches, vocab, spoilt_loss, forward_only, *others)
        if due("gradients") and not forward_only:
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.fill_(math.inf)
        return result

    def omitting(optimizer: Any, *arguments: Any, **named: Any) -> Any:
        if step not in plan.get("omitted", []):
            return update(optimizer, *arguments, **named)
        megatron = optimizer.megatron
        ready, megatron.step_with_ready_grads = megatron.step_with_ready_grads, lambda: True
        result = update(optimizer, *arguments, **named)
        megatron.step_with_ready_grads = ready
        return result

    base.run_microbatches = spoilt_run  # type: ignore[assignment]
    base.MegatronModel.training_step = observed_step  # type: ignore[method-assign]
    LightningOptimizer.step = omitting  # type: ignore[method-assign]


def _sleep() -> None:
    while True:
        time.sleep(1)


def _digest(model: Any) -> str:
    digest = hashlib.blake2b()
    for tensor in _tensors(model):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    """Weights of this rank, its share of fp32 copies, and moments."""
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            # What the step before has updated is gathered by the next forward pass.
            chunk.start_param_sync(force_sync=True)
        yield from (parameter for parameter in chunk.parameters())
    megatron = model.optimizers().megatron
    for group in megatron.param_groups:
        yield from group["params"]
    for part in megatron.chained_optimizers:
        for state in part.optimizer.state.values():
            yield from (value.reshape(-1) for value in state.values() if isinstance(value, torch.Tensor))
