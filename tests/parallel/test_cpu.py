"""Megatron-Core runs on the CPU, and nobody else's torch changes."""

import importlib

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from ctpd_nemo.parallel.cpu import _MEGATRON_MODULES, cuda_type_names, enable_cpu_execution
from ctpd_nemo.parallel.layout import ParallelConfig, initialize, local_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in only where there is no GPU")


def test_torch_itself_is_untouched() -> None:
    names = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
    cuda_names = ("current_device", "synchronize", "empty_cache", "get_rng_state", "set_rng_state", "manual_seed")
    before = [getattr(torch, name) for name in names] + [getattr(torch.cuda, name) for name in cuda_names]
    assert enable_cpu_execution()
    after = [getattr(torch, name) for name in names] + [getattr(torch.cuda, name) for name in cuda_names]
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert all(not hasattr(x, "__wrapped__") for x in after[: len(names)])
    assert torch.Tensor.type(torch.ones(1)) == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@pytest.mark.parametrize("name", _MEGATRON_MODULES)
def test_megatron_modules_make_their_tensors_on_the_cpu(name: str) -> None:
    enable_cpu_execution()
    stand_in = importlib.import_module(name).__dict__["torch"]
    assert stand_in is not torch
    assert stand_in.ones(2, device="cuda").device.type == "cpu"
    assert stand_in.tensor([1.0], device=stand_in.cuda.current_device()).device.type == "cpu"
    assert stand_in.zeros(1, device="meta").device.type == "meta"
    assert stand_in.nn is torch.nn
    stand_in.cuda.synchronize()


def test_type_names_are_those_of_cuda_only_inside_the_context() -> None:
    tensor = torch.ones(1)
    with cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"


def test_random_states_of_the_tracker_are_apart_from_torchs_own() -> None:
    initialize(ParallelConfig(), seed=5)
    tracker = get_cuda_rng_tracker()

    def drawn() -> torch.Tensor:
        with tracker.fork():
            return torch.rand(4)

    before = torch.get_rng_state()
    first, second = drawn(), drawn()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    initialize(ParallelConfig(), seed=5)
    assert torch.equal(drawn(), first)
    assert torch.equal(drawn(), second)


def test_the_device_of_this_process_is_the_cpu() -> None:
    assert local_device() == torch.device("cpu")
