"""The planner's memory, operations and bytes sent beside what real steps take, in many tiny layouts on gloo.

    python benchmarks/planner_memory.py                       # layouts of one, two and four processes
    python benchmarks/planner_memory.py --processes 1 2       # those of one and two

Every process builds the model as training does and runs real steps (``planner_worker.py``). Weights, gradients and
optimizer state are counted as tensor storages; activations as the most that autograd keeps at one time; the step as the
most that is alive at one time beyond them. Prints a Markdown table, and writes it and all figures to files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctpd_nemo.convert.architecture import parse_architecture
from ctpd_nemo.data.packing import round_up, whole_multiple
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.planner.communication import step_traffic
from ctpd_nemo.planner.flops import hardware_flops
from ctpd_nemo.planner.memory import Frozen, Request, job_memory
from ctpd_nemo.planner.numerics import numerics_of
from ctpd_nemo.planner.shapes import Shape, shape_of

_WORKER = Path(__file__).with_name("planner_worker.py")
# Kinds of memory, each measured by itself; "step" is what a step takes beyond what is there before it.
KINDS = ("weights", "gradients", "optimizer", "frozen", "activations", "head", "scoring", "step")

_SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
_SIZES |= {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 1031, "max_position_embeddings": 512}
QWEN2 = {**_SIZES, "model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e4}
LLAMA = {**_SIZES, "model_type": "llama", "tie_word_embeddings": True, "head_dim": 16, "rope_theta": 1e4}
QWEN3 = {**_SIZES, "model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32, "rope_theta": 1e4}
# Other proportions: more heads, a narrow and a wide feed-forward part, another vocabulary.
NARROW = {**LLAMA, "hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6, "vocab_size": 257}
WIDE = {**QWEN2, "hidden_size": 32, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}

# Prompt and response tokens of the sequences of a microbatch; two in a row are a pair.
_UNEVEN = ((20, 40), (20, 60), (10, 33), (10, 25))
_EVEN = ((16, 48),) * 6
_ONE = ((30, 90), (30, 70))


def case(
    name: str,
    architecture: dict[str, Any] = QWEN2,
    precision: str = "fp32",
    frozen: int = 0,
    microbatches: Sequence[Any] = (_UNEVEN,) * 3,
    **parallel: Any,
) -> dict[str, Any]:
    """A case as ``planner_worker`` takes it; ``parallel`` are values of ``ParallelConfig``."""
    return {
        "name": name,
        "architecture": architecture,
        "precision": precision,
        "frozen": frozen,
        "microbatches": microbatches,
        "parallel": parallel,
    }


CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        case("one, fp32"),
        case("one, bf16, frozen", precision="bf16", frozen=2),
        case("one, selective", recompute="selective"),
        case("one, full, bf16", precision="bf16", recompute="full"),
        case("one, tied", LLAMA, microbatches=(_EVEN,)),
        case("one, query and key norms", QWEN3, precision="bf16"),
        case("one, narrow, full", NARROW, recompute="full", microbatches=(_ONE, _ONE)),
        case("one, wide, selective, bf16", WIDE, precision="bf16", recompute="selective", microbatches=(_EVEN,)),
        case("one, unsharded optimizer", precision="bf16", distributed_optimizer=False),
    ],
    2: [
        case("TP2", tensor=2),
        case("TP2 SP", tensor=2, sequence=True),
        case("TP2 SP, full, bf16", precision="bf16", tensor=2, sequence=True, recompute="full"),
        case("TP2 SP, query and key norms, bf16", QWEN3, precision="bf16", tensor=2, sequence=True),
        case("TP2, wide, selective", WIDE, tensor=2, recompute="selective", microbatches=(_EVEN,) * 2),
        case("PP2", pipeline=2, microbatches=(_UNEVEN,) * 4),
        case("PP2, tied, frozen", LLAMA, pipeline=2, frozen=1),
        case("PP2, one microbatch", pipeline=2, precision="bf16", microbatches=(_ONE,)),
        case("PP2 of 2 virtual stages", pipeline=2, virtual_pipeline=2, microbatches=(_UNEVEN,) * 4),
        case("CP2", context=2),
        case("CP2, selective, bf16", precision="bf16", context=2, recompute="selective"),
        case("DP2, bf16", precision="bf16"),
        case("DP2, narrow, unsharded optimizer", NARROW, distributed_optimizer=False, microbatches=(_EVEN,)),
    ],
    4: [
        case("TP2 SP PP2, bf16", precision="bf16", tensor=2, sequence=True, pipeline=2),
        case("TP2 SP DP2, bf16, frozen", precision="bf16", tensor=2, sequence=True, frozen=1),
        case("PP2 DP2, selective", pipeline=2, recompute="selective"),
        case("PP4, full, tied", LLAMA, pipeline=4, recompute="full", microbatches=(_EVEN,) * 5),
    ],
}


def run_cases(processes: int, cases: Sequence[dict[str, Any]], timeout: float = 600.0) -> list[list[dict[str, Any]]]:
    """What every rank measured, ``[rank][case]``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(_WORKER), str(path), folder]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(done.stderr[-10_000:])
        ranks = [Path(folder) / f"rank-{rank}.json" for rank in range(processes)]
        return [json.loads(rank.read_text(encoding="utf-8")) for rank in ranks]


def _environment() -> dict[str, str]:
    """One thread a process, and no launcher's variables where this process has been launched itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_WORKER.resolve().parents[1])}


def predict(case: dict[str, Any], processes: int, stage: int) -> dict[str, Any]:
    """The planner's figures for a rank of a pipeline stage, by the names that ``planner_worker`` uses."""
    architecture = parse_architecture(case["architecture"], case["name"])
    parallel = ParallelConfig(**case["parallel"])
    numerics = numerics_of(PrecisionConfig(case["precision"]), architecture)
    replicas = processes // (parallel.tensor * parallel.pipeline)
    shapes = [_shape(sequences, parallel) for sequences in case["microbatches"]]
    request = Request(
        architecture=architecture,
        shape=shapes[0],
        microbatches=len(shapes),
        step_tokens=sum(shape.tokens for shape in shapes),
        frozen=(Frozen(architecture, case["frozen"], shapes[0], numerics),) if case["frozen"] else (),
        attention="local",
        device="cpu",
    )
    memory = job_memory(request, parallel, numerics, replicas)[stage]
    traffic = step_traffic(architecture, parallel, numerics, shapes, replicas, stage, attention="local")
    return {
        **{kind: getattr(memory, kind) for kind in KINDS if kind != "step"},
        "step": memory.passing,
        "flops": sum(hardware_flops(architecture, parallel, shape, device="cpu").total for shape in shapes),
        "bytes": {f"{one.group} {one.kind}": one.payload for one in traffic},
        "calls": {f"{one.group} {one.kind}": one.calls for one in traffic},
    }


def _shape(sequences: Sequence[tuple[int, int]], parallel: ParallelConfig) -> Shape:
    """The shape of a microbatch as ``planner_worker`` builds it."""
    multiple = 2 * parallel.context if parallel.context > 1 else 1
    return shape_of(
        [round_up(prompt + response, multiple) for prompt, response in sequences],
        sum(response for _, response in sequences),
        "local",
        multiple=whole_multiple(parallel.token_shares(), multiple),
        context=parallel.context,
    )


def compare(processes: int, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every case and rank: what was measured and what was predicted."""
    measured, rows = run_cases(processes, cases), []
    for number, one in enumerate(cases):
        ranks = [rank[number] for rank in measured]
        parallel = ParallelConfig(**one["parallel"])
        replicas = processes // (parallel.tensor * parallel.pipeline * parallel.context)
        # A replica's ranks share its operations; a single rank's are not told apart.
        flops = sum(rank["flops"] for rank in ranks) / replicas
        for rank in ranks:
            predicted = predict(one, processes, rank["stage"])
            rows.append({"case": one["name"], "measured": {**rank, "flops": flops}, "predicted": predicted})
    return rows


def error(row: dict[str, Any], kind: str) -> float | None:
    """How far a prediction is off, as a share of what was measured; ``None`` where there is nothing."""
    measured = row["measured"][kind]
    return None if not measured else row["predicted"][kind] / measured - 1


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: predicted over measured less one, for every case; of its ranks the one that is furthest off."""
    lines = ["| case | " + " | ".join((*KINDS, "operations", "bytes sent")) + " |", "|---" * (len(KINDS) + 3) + "|"]
    for name in dict.fromkeys(row["case"] for row in rows):
        ranks = [row for row in rows if row["case"] == name]
        cells = [_cell([error(rank, kind) for rank in ranks]) for kind in (*KINDS, "flops")]
        equal = all(_same_bytes(rank) for rank in ranks)
        lines.append(f"| {name} | " + " | ".join([*cells, "equal" if equal else "differ"]) + " |")
    return "\n".join(lines)


def _cell(errors: Sequence[float | None]) -> str:
    found = [error for error in errors if error is not None]
    return f"{max(found, key=abs):+.1%}" if found else "-"


def counted(row: dict[str, Any], what: str) -> dict[str, float]:
    """Measured "bytes" or "calls" of the collectives that are predicted; others carry a single number each."""
    left_out = ("other", "pipeline receive", "pipeline broadcast")
    return {key: value for key, value in row["measured"][what].items() if not key.startswith(left_out)}


def _same_bytes(row: dict[str, Any]) -> bool:
    return all(counted(row, what) == row["predicted"][what] for what in ("bytes", "calls"))


def main() -> None:
    """Measure, predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", default="planner_memory.json")
    parser.add_argument("--markdown", default="planner_memory.md")
    args = parser.parse_args()
    rows = [row for processes in args.processes for row in compare(processes, CASES[processes])]
    Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    Path(args.markdown).write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
