"""What is made while Lightning sets models up is on the device where it should be; the GPU is ``meta`` here."""

import dataclasses

import torch

from ctpd_nemo.data.loader import Batching
from ctpd_nemo.losses.dskd import Projectors
from ctpd_nemo.models.memory import full_microbatch
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.strategy import MegatronStrategy

GPU = torch.device("meta")


def test_models_are_set_up_without_a_default_device() -> None:
    strategy = MegatronStrategy(ParallelConfig(), seed=0, devices=1)
    strategy.parallel_devices = [GPU]
    assert strategy.root_device == GPU
    with strategy.tensor_init_context():
        assert torch.empty(1).device.type == "cpu"


def test_microbatches_are_on_the_cpu_whatever_the_default_device() -> None:
    with GPU:
        microbatch = full_microbatch(64, 32, Batching(64))
    values = (getattr(microbatch, field.name) for field in dataclasses.fields(microbatch))
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"cpu"}


def test_projectors_are_drawn_alike_whatever_the_default_device() -> None:
    expected = Projectors(4, 6, 1, torch.float32).state_dict()
    with GPU:
        found = Projectors(4, 6, 1, torch.float32).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
