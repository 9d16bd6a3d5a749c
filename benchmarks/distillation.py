"""What the teacher's distributions cost: the teacher beside the student, or its largest log-probs from a cache.

    python benchmarks/distillation.py           # on the tokenizers and pairs of the folder shared/ beside the checkout
    python benchmarks/distillation.py --top-k 20 --sides sft uld_online uld_cached

All sides train one student, Llama-shaped, tiny, fp32, on the CPU, on the same chosen responses in the same order.

    sft                    cross-entropy alone
    uld_whole              ULD on whole distributions, the teacher beside the student
    uld_online             ULD on the k largest probabilities, likewise
    uld_cached             the same from the cache
    multilevel_ot_online   multi-level optimal transport, the teacher beside the student
    multilevel_ot_cached   the same from the cache
    dskd                   DSKD, the teacher beside the student

Each side is a process of its own, and they take turns step by step (``turns.py``). Memory is the largest resident set
of the process from its first step on. The cache is in half precision; that it gives what the teacher gives is shown by
the losses, step by step. On a GPU shares are others: a teacher many times the student's size costs more beside it.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import Spread, in_fresh_process, ratio
from report import Table, add_report_arguments, begin, write_report
from side_by_side.setting import DistillationSetting
from turns import SideRun, take_turns

SHARED = Path(__file__).resolve().parents[2] / "shared"
MIB = 2**20
BASE = "sft"
SIDES = ("sft", "uld_whole", "uld_online", "uld_cached", "multilevel_ot_online", "multilevel_ot_cached", "dskd")
FIELDS = [name for name in DistillationSetting.__dataclass_fields__ if name != "folder"]
EQUALS = (("uld_online", "uld_cached"), ("multilevel_ot_online", "multilevel_ot_cached"))


def main() -> None:
    """Build the world, run the sides, report."""
    arguments = parse_arguments()
    begin(arguments)
    # Bars of several processes on one terminal.
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        setting = DistillationSetting(folder=Path(folder), **{name: getattr(arguments, name) for name in FIELDS})
        world = in_fresh_process(build_world, setting)
        sides = {name: f"side_by_side.distillation:{name}" for name in arguments.sides}
        runs = take_turns(sides, [setting], setting.steps)
    results = {"world": world, **summary(runs, arguments.warmup)}
    write_report("What a teacher costs", [costs_table(arguments, results), losses_table(results)], results, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--student-tokenizer", type=Path, default=SHARED / "tokenizers/llama3", metavar="FOLDER")
    parser.add_argument("--teacher-tokenizer", type=Path, default=SHARED / "tokenizers/qwen2", metavar="FOLDER")
    parser.add_argument("--preferences", type=Path, default=SHARED / "preferences/train.jsonl", metavar="FILE")
    parser.add_argument("--student-vocab", type=int, default=0, help="rows of the embedding; 0: one for every token")
    parser.add_argument("--teacher-vocab", type=int, default=0, help="the same of the teacher")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a prompt and a response")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--teacher-layers", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--steps", type=int, default=5, help="of each side, those of the warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    add_report_arguments(parser)
    return parser.parse_args()


def build_world(setting: DistillationSetting) -> dict[str, float]:
    """Call ``side_by_side.distillation``, whose libraries are only wanted in the process that runs this."""
    from side_by_side import distillation

    return distillation.build_world(setting)


def summary(runs: Mapping[str, SideRun], warmup: int) -> dict[str, Any]:
    """What is reported: each side's times and memory, beside fine-tuning, and how far losses are apart."""
    timed = {name: run.seconds[warmup:] for name, run in runs.items()}
    cpu = {name: run.cpu_seconds[warmup:] for name, run in runs.items()}
    base = next(iter(runs)) if BASE not in runs else BASE
    sides = {
        name: {
            "step_seconds": Spread.of(timed[name]),
            "step_cpu_seconds": Spread.of(cpu[name]),
            "process_bytes": run.process_bytes,
            "idle_bytes": run.idle_bytes,
            "step_ratio": ratio(timed[name], timed[base]),
            "step_cpu_ratio": ratio(cpu[name], cpu[base]),
            "more_bytes": run.process_bytes - runs[base].process_bytes,
            "more_idle_bytes": run.idle_bytes - runs[base].idle_bytes,
            "seconds": run.seconds,
            "cpu_seconds": run.cpu_seconds,
            "steps": run.steps,
        }
        for name, run in runs.items()
    }
    losses = [
        {
            "sides": [one, other],
            "loss": [run.steps[-1]["loss"] for run in (runs[one], runs[other])],
            "largest_difference": max(
                abs(a["loss"] - b["loss"]) for a, b in zip(runs[one].steps, runs[other].steps, strict=True)
            ),
        }
        for one, other in EQUALS
        if one in runs and other in runs
    ]
    return {"base": base, "sides": sides, "losses": losses}


def costs_table(arguments: argparse.Namespace, results: Mapping[str, Any]) -> Table:
    """One row a side."""
    world, base = results["world"], results["base"]
    caption = (
        f"{arguments.batch} chosen responses a step, sequences of at most {arguments.max_length} tokens; fp32, CPU. "
        f"The student has {arguments.layers} layers of {arguments.hidden} and {world['student_bytes'] / MIB:.0f} MiB "
        f"of weights, the teacher {arguments.teacher_layers} of {arguments.teacher_hidden} and "
        f"{world['teacher_bytes'] / MIB:.0f} MiB. The cache has {arguments.top_k} log-probs a token in half precision: "
        f"{world['cached_bytes_per_token']:.0f} bytes a token on disk ({world['cached_tokens']:,} tokens). Medians and "
        f"quartiles of {arguments.steps - arguments.warmup} steps; ratios turn by turn."
    )
    header = ["side", "step, s", f"beside {base}", f"CPU time beside {base}", f"memory beyond {base}'s, MiB"]
    header.append("of it before training, MiB")
    rows = [
        [
            name,
            side["step_seconds"].text(),
            side["step_ratio"].text(2),
            side["step_cpu_ratio"].text(2),
            f"{side['more_bytes'] / MIB:.0f}",
            f"{side['more_idle_bytes'] / MIB:.0f}",
        ]
        for name, side in results["sides"].items()
    ]
    return Table(caption, header, rows)


def losses_table(results: Mapping[str, Any]) -> Table:
    """One row a pair of sides that compute the same but for the rounding of the cache."""
    rows = [
        [
            " and ".join(row["sides"]),
            " and ".join(f"{loss:.6f}" for loss in row["loss"]),
            f"{row['largest_difference']:.1e}",
        ]
        for row in results["losses"]
    ]
    return Table(
        "Beside the teacher and from the cache, over all steps.", ["sides", "last loss", "largest difference"], rows
    )


if __name__ == "__main__":
    main()
