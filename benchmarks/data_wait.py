"""How long training waits for data, on the shapes of the quickstart.

    python benchmarks/data_wait.py                 # two workers; pairs encoded as they are needed, and encoded ahead

Makes the world of the quickstart and trains its student for some steps, as ``conf/experiment/quickstart.yaml`` says,
and with two workers. Sides take turns, each run in a process of its own; they are the methods, with pairs encoded on
the fly and read from an encoded dataset. What is reported is what a run logs of itself in ``metrics.jsonl``: the share
of step time that was spent waiting for data once all workers have started, the wait for the first step, which holds the
start of the first worker, and the longest of the others, mostly for the second worker; then the time of a step, and
what a run takes beside its steps, encoding ahead included. Medians over the turns with their quartiles, the longest
waits of each.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import Spread, in_fresh_process
from report import Table, add_report_arguments, begin, write_report

CONF = Path(__file__).resolve().parents[1] / "conf"
SIDES = {"on the fly": None, "encoded ahead": "auto"}


def main() -> None:
    arguments = parse_arguments()
    begin(arguments)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as home:
        in_fresh_process(make_world, home, arguments.pairs)
        for turn in range(arguments.turns):
            for method in arguments.methods:
                for side, encoded in SIDES.items():
                    job = {"run_dir": f"{home}/{turn}-{encoded}/{method}", "encoded": encoded}
                    job |= {"method": method, "steps": arguments.steps, "workers": arguments.workers}
                    runs.setdefault(f"{method}, {side}", []).append(in_fresh_process(train_once, home, job))
    rows = [row_of(name, found) for name, found in runs.items()]
    header = ["run", "waiting for data", "first step's wait, s", "longest other, s (its step)"]
    header += ["step, s", "tokens/s", "beside the steps, s"]
    caption = f"{arguments.steps} steps, {arguments.workers} workers, {arguments.turns} turns; median (quartiles):"
    write_report("Waiting for data", [Table(caption, header, rows)], runs, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2400, help="pairs of the world")
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--steps", type=int, default=75, help="75 of 32 pairs are an epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    add_report_arguments(parser)
    return parser.parse_args()


def make_world(home: str, pairs: int) -> None:
    """Pairs, tokenizers and models."""
    from ctpd_nemo.pipeline.tiny_world.build import build_tiny_world

    build_tiny_world(Path(home) / "world", n_train=pairs, n_test=1)


def train_once(home: str, job: dict[str, Any]) -> dict[str, float]:
    """One training job in this process; what it says of its waiting."""
    from ctpd_nemo.pipeline import quiet

    quiet.before_imports()
    import time

    from omegaconf import OmegaConf

    from ctpd_nemo.pipeline.config import run_config
    from ctpd_nemo.pipeline.train import train

    quiet.after_imports()
    tiny = OmegaConf.load(CONF / "experiment" / "quickstart.yaml")
    values = {
        "method": {"name": job["method"]},
        "model": {"student": {"path": f"{home}/world/student"}},
        "run_dir": job["run_dir"],
        "data": {
            **tiny.data,
            "train": [f"{home}/world/train.jsonl"],
            "num_workers": job["workers"],
            "encoded": job["encoded"],
        },
        "optim": {**tiny.optim, "lr": 1e-4},
        "precision": tiny.precision,
        "trainer": {"epochs": tiny.trainer.epochs, "max_steps": job["steps"]},
    }
    started = time.perf_counter()
    train(run_config(OmegaConf.create(values)))
    whole = time.perf_counter() - started
    lines = (Path(job["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "step_seconds" in row]
    steps = sum(row["step_seconds"] + row["data_wait_seconds"] for row in rows)
    longest = max(rows[1:], key=lambda row: row["data_wait_seconds"])
    return {
        "wait_share": rows[-1]["data_wait_share"],
        "first_wait_seconds": rows[0]["data_wait_seconds"],
        "longest_wait_seconds": longest["data_wait_seconds"],
        "longest_wait_step": longest["step"],
        "step_seconds": statistics.median(row["step_seconds"] for row in rows[1:]),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows[1:]),
        # Opening files, encoding ahead, building the model; the last checkpoint too, which is small.
        "beside_steps_seconds": whole - steps,
    }


def row_of(name: str, found: list[dict[str, float]]) -> list[str]:
    """A line of the table."""
    spread = {key: Spread.of([run[key] for run in found]) for key in found[0]}
    share = spread["wait_share"]
    return [
        name,
        f"{share.median:.2%} ({share.low:.2%} to {share.high:.2%})",
        spread["first_wait_seconds"].text(2),
        ", ".join(f"{run['longest_wait_seconds']:.2f} ({run['longest_wait_step']:.0f})" for run in found),
        spread["step_seconds"].text(4),
        spread["tokens_per_second"].text(0),
        spread["beside_steps_seconds"].text(1),
    ]


if __name__ == "__main__":
    main()
