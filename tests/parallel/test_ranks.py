"""Which rank a process is, is what torchrun says, and nothing that an allocation or a library may seem to say."""

import json
import os
import sys
from pathlib import Path

import lightning.fabric.plugins.environments.mpi as lightning_mpi
import pytest
import torch
from lightning_utilities.core.imports import RequirementCache

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.ranks import JobEnvironment, Ranks, check_device, read_ranks
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, small_job, small_world

_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
# What a single process finds around it, where no torchrun has started it.
AROUND = {
    "a shell of salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"},
    "a batch script": {
        **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        **{"SLURM_NTASKS_PER_NODE": "8", "SLURM_NODELIST": "node-[0-1]", "SLURM_JOB_NAME": "train"},
    },
    "one of several tasks of srun": {
        **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"},
        **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "train"},
    },
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
    "LSF": {
        **{"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "/nowhere", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
        "JSM_NAMESPACE_LOCAL_RANK": "1",
    },
    "a pod of Kubernetes": {"NODE_RANK": "1", "NNODES": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "Kubeflow's operator, one pod": {"WORLD_SIZE": "1", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
    "a TPU": {"TPU_WORKER_ID": "3", "XRT_TPU_CONFIG": "x", "PJRT_DEVICE": "TPU"},
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of torchrun, as monkeypatch finds and leaves it."""
    for name in _OURS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def broken_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mpi4py`` as some images have it: installed, and without the library that it loads."""
    package = tmp_path / "site" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')\n")
    (package.with_name("mpi4py-4.0.0.dist-info")).mkdir()
    metadata = "Metadata-Version: 2.1\nName: mpi4py\nVersion: 4.0.0\n"
    (package.with_name("mpi4py-4.0.0.dist-info") / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    # Lightning looks once.
    monkeypatch.setattr(lightning_mpi, "_MPI4PY_AVAILABLE", RequirementCache("mpi4py"))
    with pytest.raises(RuntimeError, match="cannot load MPI library"):
        lightning_mpi.MPIEnvironment.detect()


@pytest.mark.parametrize("around", AROUND)
def test_a_process_that_torchrun_has_not_started_is_a_job_by_itself(
    around: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in AROUND[around].items():
        monkeypatch.setenv(name, value)
    assert read_ranks() == Ranks(0, 1, 0, 1, 0, launched=False)


def test_a_job_runs_with_all_of_it_around_and_a_broken_mpi(
    alone: None, broken_mpi: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains, logs and ends as a job by itself: Lightning and NeMo are told, and do not look."""
    world = small_world(tmp_path / "world")
    for variables in AROUND.values():
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "3")
    train(run_config(composed("train", small_job(world, tmp_path / "run", "sft", "trainer.max_steps=1"))))
    assert [json.loads(row)["step"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "config.json").exists()
    assert os.environ["WORLD_SIZE"] == "1", "left as it was found"


def test_what_torchrun_says_holds_whatever_is_around_it(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in (*AROUND.values(), TORCHRUN):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    assert read_ranks() == Ranks(5, 8, 1, 4, 1, launched=True)
    told = JobEnvironment()
    found = (told.global_rank(), told.world_size(), told.local_rank(), told.node_rank(), told.main_port)
    assert found == (5, 8, 1, 1, 29500)
    told.set_global_rank(0)
    told.set_world_size(1)
    told.teardown()
    assert (told.global_rank(), told.world_size()) == (5, 8)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"RANK": None}, "RANK"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"RANK": "8"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"RANK": "five"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "8.0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE"),
        # Without a job there is no rank but the first.
        ({**dict.fromkeys(TORCHRUN), "RANK": "1"}, "RANK"),
        ({**dict.fromkeys(TORCHRUN), "LOCAL_RANK": "1"}, "LOCAL_RANK"),
    ],
)
def test_variables_that_make_no_rank_are_named(
    changed: dict[str, str | None], place: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TORCHRUN, **changed}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        read_ranks()
    assert error.value.place == place
    with pytest.raises(InputError, match=r"what torchrun gives each process|tensor 1 x pipeline 1"):
        initialize(ParallelConfig())


def test_a_process_without_a_gpu_of_its_own_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device(Ranks(local_rank=0))
    with pytest.raises(InputError, match=r"LOCAL_RANK: found 3, where 1 GPU is visible; .*--nproc-per-node 1"):
        check_device(Ranks(local_rank=3))
