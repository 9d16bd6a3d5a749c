"""From environment variables to torchrun, and what is missing said in one line."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.pipeline import quiet
from tests.docker.stubs import ROOT, Stubs, without_a_job
from tests.pipeline.recipe import SMALL_BATCHES, small_world

ENTRYPOINT = "docker/entrypoint.sh"
TWO_GPUS = 'printf "GPU 0: H100 (UUID: GPU-1)\\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\\nGPU 1: H100 (UUID: GPU-2)\\n"'
SLURM = {
    "SLURM_JOB_ID": "12345678",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_NODEID": "2",
}


def torchrun_options(stubs: Stubs, **environment: str) -> list[str]:
    """The options that ``torchrun`` is called with; what follows them is checked here."""
    stubs.add("torchrun")
    stubs.add("nvidia-smi", TWO_GPUS)
    done = stubs.run(ENTRYPOINT, "train", "method=sft", "data.train=[a b.jsonl]", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = [call for call in stubs.calls() if call[0] == "torchrun"]
    assert call[-3:] == [str(ROOT / "tools/train.py"), "method=sft", "data.train=[a b.jsonl]"]
    return call[1:-3]


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0, GPU-8a6f,MIG-1,"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "3,1,-1,0"}, 2),
        ({"NPROC_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, 4),
        ({"NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"NNODES": "1", "MASTER_ADDR": "elsewhere", "NODE_RANK": "0"}, 2),
    ],
)
def test_one_node_runs_a_process_for_each_visible_gpu(
    stubs: Stubs, environment: dict[str, str], processes: int
) -> None:
    expected = ["--nnodes=1", f"--nproc-per-node={processes}", "--standalone"]
    assert torchrun_options(stubs, **environment) == expected


@pytest.mark.parametrize(
    ("environment", "rank", "address", "port"),
    [
        ({"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "ctpd-0.ctpd"}, "3", "ctpd-0.ctpd", "29500"),
        ({"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, "0", "10.0.0.7", "1234"),
        (SLURM, "2", "gpu07", "25678"),
        (SLURM | {"MASTER_ADDR": "ib0-gpu07", "MASTER_PORT": "4321"}, "2", "ib0-gpu07", "4321"),
    ],
    ids=["kubernetes", "by hand", "slurm", "slurm, by hand"],
)
def test_many_nodes_meet_at_node_0(
    stubs: Stubs, environment: dict[str, str], rank: str, address: str, port: str
) -> None:
    assert torchrun_options(stubs, **environment) == [
        "--nnodes=4",
        "--nproc-per-node=2",
        f"--node-rank={rank}",
        f"--master-addr={address}",
        f"--master-port={port}",
        "--rdzv-conf=timeout=2700",
    ]


def test_a_node_waits_for_the_others_longer_than_their_ranks_for_one_that_is_gone(stubs: Stubs) -> None:
    (timeout,) = [option for option in torchrun_options(stubs, **SLURM) if option.startswith("--rdzv-conf=timeout=")]
    minutes = ParallelConfig().timeout_minutes + 1
    assert int(timeout.rpartition("=")[2]) > 60 * minutes


@pytest.mark.parametrize("soft", [64, 1024])
def test_torchrun_may_open_as_many_files_as_the_hard_limit_allows(stubs: Stubs, soft: int) -> None:
    stubs.add("torchrun", "ulimit -Sn; ulimit -Hn")
    script = f'ulimit -n 2048; ulimit -Sn {soft}; exec "{ROOT / ENTRYPOINT}" train'
    environment = stubs.environment | {"NPROC_PER_NODE": "1"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2048\n2048\n", "")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("a1,gpu[3-4]", "a1"),
        ("gpu[003-004,9],a1", "gpu003"),
        ("gpu[5,7-9]", "gpu5"),
        ("rack[2-3]node[10-12]-ib,x", "rack2node10-ib"),
        ("gpu-a.cluster[1-2]", "gpu-a.cluster1"),
    ],
)
def test_node_0_is_the_first_host_of_slurms_list(stubs: Stubs, nodes: str, first: str) -> None:
    assert f"--master-addr={first}" in torchrun_options(stubs, **SLURM | {"SLURM_STEP_NODELIST": nodes})


FOUR = {"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "a", "NPROC_PER_NODE": "8"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "NPROC_PER_NODE: found nothing, and no GPU; expected"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "NPROC_PER_NODE: found nothing, and no GPU; expected"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "NPROC_PER_NODE: found nothing, and no GPU; expected"),
        ({}, "NPROC_PER_NODE: found nothing, and no GPU; expected"),
        (FOUR | {"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE: found all; expected"),
        (FOUR | {"NNODES": "0"}, "NNODES: found 0; expected"),
        (FOUR | {"NNODES": "2:4"}, "NNODES: found 2:4; expected"),
        (FOUR | {"NNODES": "08"}, "NNODES: found 08; expected"),
        (FOUR | {"NNODES": "a[$(touch made)]"}, "NNODES: found a[$(touch made)]; expected"),
        (FOUR | {"NODE_RANK": "a b"}, "NODE_RANK: found a b; expected 0 to 3"),
        (FOUR | {"NODE_RANK": ""}, "NODE_RANK: found nothing; expected 0 to 3, another on each"),
        (FOUR | {"NODE_RANK": "4"}, "NODE_RANK: found 4; expected 0 to 3"),
        (FOUR | {"NODE_RANK": "-1"}, "NODE_RANK: found -1; expected 0 to 3"),
        (FOUR | {"MASTER_ADDR": ""}, "MASTER_ADDR: found nothing; expected the name of node 0"),
        (FOUR | {"MASTER_PORT": "http"}, "MASTER_PORT: found http; expected"),
        (FOUR | {"MASTER_PORT": "65536"}, "MASTER_PORT: found 65536; expected"),
        (SLURM | {"NPROC_PER_NODE": "8", "SLURM_JOB_ID": "x[$(touch made)]"}, "SLURM_JOB_ID: found x[$(touch made)]; "),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "32"},
            "SLURM_STEP_NUM_TASKS: found 32 tasks on 4 nodes; expected one",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_line(stubs: Stubs, environment: dict[str, str], said: str) -> None:
    stubs.add("torchrun")
    stubs.add("nvidia-smi", "exit 9")
    done = stubs.run(ENTRYPOINT, "train", **environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")
    assert not any(call[0] == "torchrun" for call in stubs.calls())
    assert not (stubs.folder / "made").exists()


def test_no_command_is_an_error(stubs: Stubs) -> None:
    done = stubs.run(ENTRYPOINT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: command line: found nothing; expected ")


def test_other_tools_run_in_one_process_and_need_no_gpu(stubs: Stubs) -> None:
    stubs.add("torchrun")
    stubs.add("python")
    assert stubs.run(ENTRYPOINT, "export_hf", "folder=out dir").returncode == 0
    assert stubs.calls() == [["python", str(ROOT / "tools/export_hf.py"), "folder=out dir"]]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_is_a_command(stubs: Stubs, name: str) -> None:
    stubs.add("torchrun")
    stubs.add("python")
    assert stubs.run(ENTRYPOINT, name, NPROC_PER_NODE="2").returncode == 0
    (call,) = stubs.calls()
    assert call[-1] == str(ROOT / "tools" / f"{name}.py")


def test_anything_else_is_run_as_it_is(stubs: Stubs) -> None:
    done = stubs.run(ENTRYPOINT, "bash", "-c", 'printf "%s|" "$@"; exit 7', "bash", "two words", "$HOME", "")
    assert (done.returncode, done.stdout, done.stderr) == (7, "two words|$HOME||", "")


@pytest.mark.parametrize("command", [["train"], ["bash", "-c", "echo $$; exec sleep 3600"]])
def test_signals_reach_the_command_itself(stubs: Stubs, command: list[str]) -> None:
    stubs.add("torchrun", "echo $$; exec sleep 3600")
    with stubs.start(ENTRYPOINT, *command, NPROC_PER_NODE="1") as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == -signal.SIGTERM


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path: Path) -> None:
    """Two entry points on this machine, each a node of one process, with gloo."""
    quiet.after_imports()
    world = small_world(tmp_path / "world")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = without_a_job({**nodes, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    values = ["method=sft", f"model.student.path={world.student}", f"data.train=[{world.train}]", *SMALL_BATCHES]
    values += ["trainer.max_steps=1", "parallel.tensor=2", f"run_dir={tmp_path / 'run'}"]
    processes = [
        subprocess.Popen(
            [ROOT / ENTRYPOINT, "train", *values],
            env=environment | {"NODE_RANK": str(rank)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert [status for _, status in ends] == [0, 0], ends
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "loss" in line)
    assert row["step"] == 1
    assert (tmp_path / "run/checkpoints/step-00000001/metadata.json").exists()
