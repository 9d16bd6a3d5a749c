"""Experiments composed as ``tools/plan.py`` composes them, and machines of round numbers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.jobs import Job, find_jobs
from ctpd_nemo.planner.workload import Lengths, Workload, stated_lengths

CONF = Path(__file__).resolve().parents[2] / "conf"
LARGE = "experiment=qwen2.5-72b_to_llama3.1-8b"
SMALL = "experiment=qwen2.5-7b_to_llama3.2-1b"


def benchmark(name: str) -> ModuleType:
    """A script of ``benchmarks/`` as a module."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def composed(*overrides: str, name: str = "plan") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, overrides=list(overrides))


def jobs_of(*overrides: str) -> dict[str, Job]:
    return {job.name: job for job in find_jobs(composed(*overrides, name="pipeline"))}


@pytest.fixture(scope="session")
def h100() -> Hardware:
    return Hardware(**composed().hardware)


@pytest.fixture(scope="session")
def lengths() -> Lengths:
    return stated_lengths(Workload(), 2048)


@pytest.fixture
def ideal() -> Hardware:
    """Everything is reached and nothing costs a constant; 1e12 operations and bytes a second wherever one can be."""
    rates = dict.fromkeys(("bf16_tflops", "fp8_tflops", "fp32_tflops", "memory_tb_per_s"), 1.0)
    shares = dict.fromkeys(("matmul_fraction", "attention_fraction", "memory_fraction", "link_fraction"), 1.0)
    links = {"nvlink_gb_per_s": 1000.0, "network_gb_per_s": 100.0, "gpus_per_node": 8}
    return Hardware("ideal", memory_gib=80.0, read_gb_per_s=1.0, **rates, **shares, **links)
