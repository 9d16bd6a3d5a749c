"""Tests of what only a GPU has: they skip without one, and say how many devices they need."""

from pathlib import Path

import pytest
import torch

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.precision import PrecisionConfig
from tests.gpu.world import build_world

RECIPES = ("delayed", "current", "blockwise", "mxfp8")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skip without a GPU; else the process groups of one device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("transformer_engine")
    initialize(ParallelConfig())


@pytest.fixture(scope="session")
def world(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pairs, see ``world``."""
    home = tmp_path_factory.mktemp("gpu")
    build_world(home)
    return home


@pytest.fixture(params=RECIPES)
def fp8(request: pytest.FixtureRequest, gpu: None) -> PrecisionConfig:
    """Every FP8 recipe that this device has."""
    precision = PrecisionConfig(
        fp8=request.param, fp8_format="e4m3" if request.param in ("blockwise", "mxfp8") else "hybrid"
    )
    try:
        precision.check_device()
    except InputError as error:
        pytest.skip(f"{request.param}: {error.found}, needs {error.expected}")
    return precision


@pytest.fixture
def devices(gpu: None) -> int:
    """How many devices there are."""
    return torch.cuda.device_count()
