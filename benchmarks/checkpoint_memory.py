"""Host memory of saving and loading a checkpoint with the distributed optimizer, beside Megatron-Core's own way.

    python benchmarks/checkpoint_memory.py                       # 1, 2 and 4 data-parallel processes
    python benchmarks/checkpoint_memory.py --processes 1 2 --layers 8 --hidden 512

Every process builds the model as training does and takes a step; then a checkpoint is written, and read into a model
and an optimizer that have taken one. Counted is the process's own high-water mark (``VmHWM``) beyond what it held
before, the largest of the job's processes, in bytes a parameter of the model. A job does one thing by one side, once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import PeakMemory
from report import Table, add_report_arguments, begin, write_report

from ctpd_nemo.convert.architecture import parse_architecture
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel import checkpoint
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.optimizer_state import SHARDING
from ctpd_nemo.parallel.precision import PrecisionConfig

SIDES = ("Megatron-Core", "ctpd_nemo")
_MIB = 2**20
_PARALLEL = ParallelConfig(distributed_optimizer=True)


def run_jobs(processes: int, side: str, layers: int, hidden: int) -> dict[str, float]:
    """What the ranks of two jobs measured, of one that saves and one that loads: the largest of each, in bytes."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        for phase in ("save", "load"):
            work = ["--worker", folder, phase, "--sides", side, "--layers", str(layers), "--hidden", str(hidden)]
            done = subprocess.run([sys.executable, *torchrun, __file__, *work], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-10_000:])
            ranks = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("rank-*.json")]
            found |= {name: max(rank[name] for rank in ranks) for name in ("parameters", phase)}
    return found


def measure(folder: Path, phase: str, side: str, layers: int, hidden: int) -> None:
    """One process of a job."""
    dist.init_process_group("gloo")
    initialize(_PARALLEL, seed=1)
    if side == "Megatron-Core":
        checkpoint.sharded_state = _megatron_saves  # type: ignore[attr-defined]
        checkpoint.expected_state = _megatron_expects  # type: ignore[attr-defined]
        checkpoint.load_state = _megatron_loads  # type: ignore[attr-defined]
    chunks, optimizer = _stepped_model(layers, hidden)
    parameters = sum(parameter.numel() for parameter in chunks[0].parameters())
    saved = folder / "step-00000001"
    with PeakMemory() as memory:
        if phase == "save":
            checkpoint.save(saved, chunks, optimizer, checkpoint.TrainState({}, {}))
        else:
            checkpoint.load(saved, chunks, optimizer)
    found = {"parameters": parameters, phase: memory.beyond}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _stepped_model(layers: int, hidden: int) -> Any:
    sizes = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16 * hidden, "rms_norm_eps": 1e-5}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": False}
    architecture = parse_architecture(sizes, "the benchmark's model")
    chunks = wrap_data_parallel(build_gpt(architecture, _PARALLEL, PrecisionConfig("fp32")), _PARALLEL)
    optimizer = LightningOptimizer(*build_optimizer(chunks, OptimConfig(), _PARALLEL, 10))
    chunks[0].zero_grad_buffer()
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(1e-3)  # type: ignore[union-attr]
    chunks[0].finish_grad_sync()
    optimizer.step()
    return chunks, optimizer


def _megatron_saves(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    return optimizer.sharded_state_dict(model_state, metadata=SHARDING)


def _megatron_expects(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    return optimizer.sharded_state_dict(model_state, is_loading=True, metadata=SHARDING)


def _megatron_loads(optimizer: Any, state: dict[str, Any], *_: Any) -> None:
    """As its ``load_state_dict``, but for the steps of torch's AdamW, which it would look for among stored tensors."""
    (part,) = optimizer.chained_optimizers
    for kept in part.optimizer.state.values():
        kept.pop("step", None)
    part.load_parameter_state_from_fully_reshardable(state["param_state"])


def main() -> None:
    """Start the jobs, or be a process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_report_arguments(parser)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="data-parallel sizes")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--hidden", type=int, default=512, help="its hidden size")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="what to measure")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        torch.set_num_threads(1)
        folder, phase = arguments.worker
        measure(Path(folder), phase, arguments.sides[0], arguments.layers, arguments.hidden)
        return
    begin(arguments)
    rows, results = [], []
    for processes in arguments.processes:
        for side in arguments.sides:
            found = run_jobs(processes, side, arguments.layers, arguments.hidden)
            results.append({"processes": processes, "side": side, **found})
            per = [f"{found[name] / found['parameters']:.1f}" for name in ("save", "load")]
            rows.append([f"{processes} x {side}", *per, f"{found['save'] / _MIB:.0f}", f"{found['load'] / _MIB:.0f}"])
    millions = results[0]["parameters"] / 1e6
    caption = f"Host memory of a checkpoint beyond what the process held before, a model of {millions:.0f}M in fp32."
    header = ["processes, side", "save, bytes a parameter", "load, bytes a parameter", "save, MiB", "load, MiB"]
    write_report("Memory of checkpoints", [Table(caption, header, rows)], results, arguments)


if __name__ == "__main__":
    main()
