"""Benchmarks are scripts in a folder of their own; what they share is imported from there, as they do."""

import sys
from pathlib import Path

import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld, build_tiny_world
from ctpd_nemo.pipeline.tiny_world.models import ModelSize
from tests.benchmarks.script import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Two small tokenizers, and 24 pairs."""
    size = ModelSize(num_layers=1, hidden_size=16, ffn_hidden_size=16)
    folder: Path = tmp_path_factory.mktemp("benchmarks") / "world"
    return build_tiny_world(folder, n_train=24, n_test=1, teacher=size, student=size)
