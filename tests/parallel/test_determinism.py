"""``deterministic``: what libraries are told, and that nothing else is said to them by the environment."""

import os
from collections.abc import Iterator

import pytest
import torch

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import transformer_config
from ctpd_nemo.parallel.determinism import set_deterministic
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from tests.convert.test_layout import make_architecture

ARCHITECTURE = make_architecture(heads_per_group=2, groups=2, head_dim=8, width=8, tied=True)

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        # Set first, so that it is taken back whatever the test sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_megatron_and_the_libraries_of_a_gpu_are_told() -> None:
    set_deterministic(True)
    assert {name: os.environ[name] for name in VARIABLES} == VARIABLES
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    config = transformer_config(ARCHITECTURE, ParallelConfig(), PrecisionConfig(dtype="fp32"), False)
    assert config.deterministic_mode
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not transformer_config(
        ARCHITECTURE, ParallelConfig(), PrecisionConfig(dtype="fp32"), False
    ).deterministic_mode


def test_a_choice_that_serves_as_well_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    set_deterministic(True)
    assert os.environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS")])
def test_a_choice_that_does_not_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"environment, {name}: found '{value}'"):
        set_deterministic(True)
    set_deterministic(False)
