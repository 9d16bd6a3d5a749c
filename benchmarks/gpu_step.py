"""Training and scoring on one device: step time, tokens/s, share of the device's measured matrix rate, memory.

    python benchmarks/gpu_step.py                                   # on one GPU: all shapes in bf16 and FP8
    python benchmarks/gpu_step.py --parts train --students llama-3.1-8b --precisions bf16 fp8_current --profile
    python benchmarks/gpu_step.py --device cpu --shapes toy         # all but the GPU, in a minute

Three parts:

    train   CTPD from a score cache, packed real pairs, by the package's own model, loop and optimizer
    score   a frozen teacher over packed real pairs, forward only; under FP8 its weights are FP8 alone
    head    hidden states to loss and back: log-probs of this project beside Megatron-Core's and Liger's

Weights are drawn, scores invented; neither changes how long a step takes. An 8B model with its gradients and Adam's
state in fp32 needs 18 bytes a weight, 145 GB: it is measured at the depths of ``--layers``, full layers of full width
with embedding and output layer, and the report says so. Where two depths were measured, a line through them gives the
step time of the whole model; that is an estimate and named as one.

A case is a process of its own, since two models do not fit beside each other. Cases follow each other in ``--rounds``
rounds, so that a device that grows warm is warm for all, and each measures the device's matrix rate before it begins.

*Model FLOPs utilization*: operations that the mathematics needs (forward and twice that backward; padding, and logits
that are made again, not counted), over time, over the highest rate of a bf16 matrix product that was measured on this
device, whatever precision the model computes in.
"""

import argparse
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from gpu_cases.case import run_case, run_head
from gpu_cases.setting import Case, Setting
from gpu_cases.shapes import STUDENTS, TEACHERS
from gpu_cases.tables import cases_table, head_table, whole_models, whole_table
from measure import in_fresh_process
from report import add_report_arguments, begin, write_report

SHARED = Path(__file__).resolve().parents[2] / "shared"
CONF = Path(__file__).resolve().parents[1] / "conf"
# Depths at which a shape is trained where its whole does not fit.
DEPTHS = {"llama-3.1-8b": (4, 8)}


def main() -> None:
    """Run the cases, report."""
    arguments = parse_arguments()
    begin(arguments)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Compiling for the CPU takes longer than all else.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    elif not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: no GPU that torch can see; expected one, or --device cpu")
    setting = the_setting(arguments)
    cases = [
        {"case": case, **attempt(run_case, setting, case)}
        for _ in range(arguments.rounds)
        for case in the_cases(arguments)
    ]
    heads = {hidden: attempt(run_head, head_sizes(arguments, hidden)) for hidden in the_widths(arguments)}
    tables = [cases_table(part, cases, arguments) for part in ("train", "score") if part in arguments.parts]
    tables += [whole_table(cases)] if whole_models(cases) else []
    tables += [head_table(hidden, head, arguments) for hidden, head in heads.items()]
    write_report("One device", tables, {"cases": cases, "whole": whole_models(cases), "head": heads}, arguments)
    for case in cases:
        if case.get("profile"):
            print(f"\n{case['case']}\n{case['profile']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=("train", "score", "head"), default=["train", "score", "head"])
    parser.add_argument("--shapes", choices=("real", "toy"), default="real")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=["qwen2.5-7b", "qwen2.5-14b"])
    parser.add_argument("--layers", type=int, nargs="+", help="depths to train every student at, in place of its own")
    names = sorted(path.stem for path in (CONF / "precision").glob("*.yaml"))
    fp8 = [name for name in names if "fp8" in name]
    parser.add_argument("--precisions", nargs="+", choices=names, default=["bf16", *fp8])
    parser.add_argument("--student-tokenizer", type=Path, default=SHARED / "tokenizers/llama3", metavar="FOLDER")
    parser.add_argument("--teacher-tokenizer", type=Path, default=SHARED / "tokenizers/qwen2", metavar="FOLDER")
    parser.add_argument("--preferences", type=Path, default=SHARED / "preferences/train.jsonl", metavar="FILE")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a prompt and a response")
    parser.add_argument("--microbatch-tokens", type=int, default=8192, help="in training")
    parser.add_argument("--scoring-tokens", type=int, default=32768, help="tokens of a microbatch that is scored")
    parser.add_argument("--workers", type=int, default=2, help="dataloader workers")
    parser.add_argument("--steps", type=int, default=13, help="of each case, those of the warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=1, help="how often to go through all cases")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--profile", action="store_true", help="print the slowest kernels of one more step")
    parser.add_argument("--head-hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--head-vocab", type=int, default=128256)
    parser.add_argument("--head-length", type=int, default=512, help="tokens of each of the eight responses")
    add_report_arguments(parser)
    return parser.parse_args()


def the_setting(arguments: argparse.Namespace) -> Setting:
    """What the command line asks for, of all cases."""
    return Setting(**{name: getattr(arguments, name) for name in Setting.__dataclass_fields__})


def the_cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for, case by case; bf16 and FP8 of one shape follow each other."""
    toy = arguments.shapes == "toy"
    cases = []
    if "train" in arguments.parts:
        for shape in ["toy"] if toy else arguments.students:
            for layers in arguments.layers or DEPTHS.get(shape, (0,)):
                cases += [Case("train", shape, layers, precision) for precision in arguments.precisions]
    if "score" in arguments.parts:
        for shape in ["toy"] if toy else arguments.teachers:
            cases += [Case("score", shape, 0, precision) for precision in arguments.precisions]
    return cases


def attempt(function: Any, *case: Any) -> dict[str, Any]:
    """The result of a case, also where its process was killed."""
    try:
        return in_fresh_process(function, *case)
    except BrokenProcessPool:
        return {"failed": "its process was killed, as the system does where memory runs out"}


def the_widths(arguments: argparse.Namespace) -> list[int]:
    """Widths at which the head is compared."""
    return arguments.head_hidden if "head" in arguments.parts else []


def head_sizes(arguments: argparse.Namespace, hidden: int) -> dict[str, int]:
    """Four pairs of responses of one length."""
    sizes = {"hidden": hidden, "vocab": arguments.head_vocab, "pairs": 4}
    return sizes | {"length": arguments.head_length, "turns": arguments.steps}


if __name__ == "__main__":
    main()
