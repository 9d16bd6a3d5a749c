"""One step of preference training, side by side: this project, TRL, and CTPD in plain PyTorch.

    python benchmarks/methods.py                # on the tokenizers and pairs of the folder shared/ beside the checkout
    python benchmarks/methods.py --pairs 16 --steps 5 --max-length 128 --sides dpo_cached ctpd_cached
    python benchmarks/methods.py --student-tokenizer FOLDER --teacher-tokenizer FOLDER --preferences pairs.jsonl

All sides train one student, Llama-shaped, tiny, fp32, on the CPU: the same random weights, the same real pairs in the
same order and the same number of them a step, the same limit on their length, the same optimizer.

    dpo_cached    DPO, the reference's log-probs from a score cache
    ctpd_cached   CTPD, the teachers' log-probs from a score cache
    ctpd_online   CTPD, three teachers beside the student
    trl_dpo       TRL's DPOTrainer with precompute_ref_log_probs=True (``pip install -e ".[bench]"``)
    plain_ctpd    CTPD in plain PyTorch: padded, all logits, one teacher beside the student, given weights

Each side is a process of its own, and they take turns step by step (``turns.py``). A step is the whole of it: fetching
the batch, the model, the optimizer, the logs. The sides of this project tokenize and align in that time; the other two
are given token ids. Tokens are those of the pairs, without padding. Memory is the largest resident set of the process
while it trains. That the sides train the same is shown by their losses, step by step.
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Spread, in_fresh_process, ratio
from report import Table, add_report_arguments, begin, write_report
from side_by_side.setting import Setting
from turns import SideRun, take_turns

SHARED = Path(__file__).resolve().parents[2] / "shared"
GIB = 2**30
SIDES = {
    "dpo_cached": "side_by_side.ours:dpo_cached",
    "ctpd_cached": "side_by_side.ours:ctpd_cached",
    "ctpd_online": "side_by_side.ours:ctpd_online",
    "trl_dpo": "side_by_side.trl_dpo:trl_dpo",
    "plain_ctpd": "side_by_side.plain_ctpd:plain_ctpd",
}
# The same loss by two sides, step by step.
EQUALS = (("dpo_cached", "trl_dpo"), ("ctpd_cached", "ctpd_online"), ("ctpd_cached", "plain_ctpd"))
# What is compared: numerator, denominator.
STEP_RATIOS = (
    ("ctpd_cached", "dpo_cached"),
    ("ctpd_online", "ctpd_cached"),
    ("trl_dpo", "dpo_cached"),
    ("trl_dpo", "ctpd_cached"),
    ("plain_ctpd", "ctpd_cached"),
    ("plain_ctpd", "ctpd_online"),
)


def main() -> None:
    """Build the world, run the sides, report."""
    arguments = parse_arguments()
    begin(arguments)
    # Bars of several processes on one terminal.
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        setting = the_setting(arguments, Path(folder))
        in_fresh_process(build_world, setting)
        tokens = tokens_of_steps(setting)
        runs = take_turns({name: SIDES[name] for name in arguments.sides}, [setting], setting.steps)
    results = summary(runs, tokens, arguments.warmup)
    title = "Preference training side by side"
    write_report(
        title, [sides_table(arguments, results), ratios_table(results), losses_table(results)], results, arguments
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=there(), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--student-tokenizer", type=Path, default=SHARED / "tokenizers/llama3", metavar="FOLDER")
    parser.add_argument("--teacher-tokenizer", type=Path, default=SHARED / "tokenizers/qwen2", metavar="FOLDER")
    parser.add_argument("--preferences", type=Path, default=SHARED / "preferences/train.jsonl", metavar="FILE")
    parser.add_argument("--student-vocab", type=int, default=0, help="rows of the embedding; 0: one for every token")
    parser.add_argument("--teacher-vocab", type=int, default=0, help="the same of the teachers")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and a response")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=33, help="of each side, those of the warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    add_report_arguments(parser)
    return parser.parse_args()


def there() -> list[str]:
    """The sides whose libraries are installed."""
    return [name for name in SIDES if name != "trl_dpo" or importlib.util.find_spec("trl")]


def the_setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    """What the command line asks for."""
    names = set(Setting.__dataclass_fields__) - {"folder"}
    return Setting(folder=folder, **{name: getattr(arguments, name) for name in names})


def build_world(setting: Setting) -> None:
    """Call ``side_by_side.world``, whose libraries are only wanted in the process that runs this."""
    from side_by_side import world

    world.build_world(setting)


def tokens_of_steps(setting: Setting) -> list[dict[str, int]]:
    """Tokens of each step on the student's side: of the responses, of all sequences, and of these once padded."""
    pairs = setting.read_pairs()
    counts = []
    for step in range(setting.steps):
        batch = setting.batch_of_step(pairs, step)
        sides = [pair[name]["student"] for pair in batch for name in ("chosen", "rejected")]
        lengths = [len(side["prompt"]) + len(side["response"]) for side in sides]
        response = sum(len(side["response"]) for side in sides)
        counts.append({"response": response, "all": sum(lengths), "padded": max(lengths) * len(lengths)})
    return counts


def summary(runs: Mapping[str, SideRun], tokens: Sequence[Mapping[str, int]], warmup: int) -> dict[str, Any]:
    """What is reported: each side's rates and memory, ratios turn by turn, and how far losses are apart."""
    timed = {name: run.seconds[warmup:] for name, run in runs.items()}
    cpu = {name: run.cpu_seconds[warmup:] for name, run in runs.items()}
    counted = tokens[warmup:]
    sides = {
        name: {
            "step_seconds": Spread.of(timed[name]),
            "step_cpu_seconds": Spread.of(cpu[name]),
            "response_tokens_per_second": sum(step["response"] for step in counted) / sum(timed[name]),
            "tokens_per_second": sum(step["all"] for step in counted) / sum(timed[name]),
            "process_bytes": run.process_bytes,
            "idle_bytes": run.idle_bytes,
            "seconds": run.seconds,
            "cpu_seconds": run.cpu_seconds,
            "steps": run.steps,
        }
        for name, run in runs.items()
    }
    ratios = [
        {
            "sides": [above, below],
            "step_seconds": ratio(timed[above], timed[below]),
            "step_cpu_seconds": ratio(cpu[above], cpu[below]),
            "process_bytes": runs[above].process_bytes / runs[below].process_bytes,
            "training_bytes": _beyond(runs[above]) / _beyond(runs[below]),
        }
        for above, below in STEP_RATIOS
        if above in runs and below in runs
    ]
    return {"sides": sides, "ratios": ratios, "losses": _losses(runs), "tokens": list(tokens)}


def _beyond(run: SideRun) -> int:
    return run.process_bytes - run.idle_bytes


def _losses(runs: Mapping[str, SideRun]) -> list[dict[str, Any]]:
    """Largest difference over all steps, of the loss and of the mean log-prob of chosen responses."""
    pairs = [(one, other) for one, other in EQUALS if one in runs and other in runs]
    return [
        {"sides": [one, other]}
        | {
            f"{name}_difference": max(
                abs(a[name] - b[name]) for a, b in zip(runs[one].steps, runs[other].steps, strict=True)
            )
            for name in ("loss", "logprob_chosen")
        }
        for one, other in pairs
    ]


def sides_table(arguments: argparse.Namespace, results: Mapping[str, Any]) -> Table:
    """One row a side."""
    counted = results["tokens"][arguments.warmup :]
    mean = {kind: sum(step[kind] for step in counted) / len(counted) for kind in ("response", "all", "padded")}
    caption = (
        f"{arguments.pairs} pairs, {arguments.batch} a step, at most {arguments.max_length} tokens each; hidden "
        f"{arguments.hidden}, {arguments.layers} layers, fp32, CPU. A step has {mean['response']:.0f} response tokens "
        f"of {mean['all']:.0f} on average; padded to the longest of its batch it would have {mean['padded']:.0f}. "
        f"{len(counted)} steps a side, medians and quartiles."
    )
    header = ["side", "step, s", "CPU s a step", "response tokens/s", "tokens/s", "peak memory, GiB"]
    header.append("of it before training, GiB")
    rows = [
        [
            name,
            side["step_seconds"].text(),
            side["step_cpu_seconds"].text(),
            f"{side['response_tokens_per_second']:,.0f}",
            f"{side['tokens_per_second']:,.0f}",
            f"{side['process_bytes'] / GIB:.2f}",
            f"{side['idle_bytes'] / GIB:.2f}",
        ]
        for name, side in results["sides"].items()
    ]
    return Table(caption, header, rows)


def ratios_table(results: Mapping[str, Any]) -> Table:
    """One row a comparison."""
    header = ["ratio", "step time", "CPU time", "peak memory", "memory beyond that before training"]
    rows = [
        [
            " / ".join(row["sides"]),
            row["step_seconds"].text(),
            row["step_cpu_seconds"].text(),
            f"{row['process_bytes']:.2f}",
            f"{row['training_bytes']:.2f}",
        ]
        for row in results["ratios"]
    ]
    return Table("Ratios of step times are taken turn by turn, on the same pairs: median and quartiles.", header, rows)


def losses_table(results: Mapping[str, Any]) -> Table:
    """One row a pair of sides that compute the same."""
    header = ["sides", "first loss", "last loss", "largest difference of losses", "of log p(chosen)"]
    rows = []
    for row in results["losses"]:
        first, last = (
            " and ".join(f"{results['sides'][name]['steps'][step]['loss']:.6f}" for name in row["sides"])
            for step in (0, -1)
        )
        differences = [f"{row[f'{name}_difference']:.1e}" for name in ("loss", "logprob_chosen")]
        rows.append([" and ".join(row["sides"]), first, last, *differences])
    return Table("Sides that compute the same, over all steps.", header, rows)


if __name__ == "__main__":
    main()
