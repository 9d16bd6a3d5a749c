"""Megatron's optimizer and schedule against torch's AdamW and the formula of the schedule."""

import math
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.precision import PrecisionConfig
from tests.rounding import of_sum


@pytest.fixture
def make(tmp_path: Path):
    """``make(optim, steps)``: a model's wrapped chunk and its optimizer."""
    Qwen2Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)

    def build(optim: OptimConfig, steps: int, distributed: bool = True):
        initialize(ParallelConfig(), seed=1)
        parallel = ParallelConfig(distributed_optimizer=distributed)
        gpt = build_gpt(read_architecture(tmp_path), parallel, PrecisionConfig("fp32"))
        for parameter in gpt[0].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        chunks = wrap_data_parallel(gpt, parallel)
        return chunks[0], LightningOptimizer(*build_optimizer(chunks, optim, parallel, steps))

    return build


def scheduled(optim: OptimConfig, step: int, steps: int) -> float:
    warmup = int(optim.warmup_fraction * steps)
    if warmup and step <= warmup:
        return optim.lr * step / warmup
    done = (step - warmup) / (steps - warmup)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[optim.schedule]
    return optim.lr if optim.schedule == "constant" else optim.min_lr + (optim.lr - optim.min_lr) * share


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rate_of_every_step_is_that_of_the_schedule(schedule: str, warmup: float, make) -> None:
    optim = OptimConfig(lr=0.1, min_lr=0.01, schedule=schedule, warmup_fraction=warmup)
    chunk, optimizer = make(optim, 8)
    for step in range(8):
        assert {group["lr"] for group in optimizer.param_groups} == {optimizer.lr}
        assert optimizer.lr == pytest.approx(scheduled(optim, step, 8), rel=1e-9)
        chunk.zero_grad_buffer()
        optimizer.step()


@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
@pytest.mark.parametrize("distributed", [True, False])
def test_updates_are_those_of_adamw_that_decays_matrices_only(clip_grad: float, distributed: bool, make) -> None:
    optim = OptimConfig(lr=0.02, schedule="constant", warmup_fraction=0.0, weight_decay=0.3, clip_grad=clip_grad)
    chunk, optimizer = make(optim, 4, distributed)
    plain = {name: parameter.detach().double().requires_grad_() for name, parameter in chunk.named_parameters()}
    groups = [
        {"params": [p for p in plain.values() if (p.ndim > 1) is matrices], "weight_decay": 0.3 * matrices}
        for matrices in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.999), eps=1e-8)
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        for name, parameter in chunk.named_parameters():
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.main_grad.copy_(gradient)
            plain[name].grad = gradient.double()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.values()))
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(plain.values(), clip_grad)
        adamw.step()
        optimizer.step()
        # A sum of squares, none of which is negative.
        assert optimizer.grad_norm == pytest.approx(norm, rel=of_sum(sum(p.numel() for p in plain.values())))
    # Each step rounds weight, decay and update, and a dozen operations on the way to an update of at most lr; clipping
    # scales both moments, and leaves their quotient.
    rtol, atol = of_sum(4 * 3), optim.lr * of_sum(4 * 16)
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), plain[name].detach(), rtol=rtol, atol=atol)
