"""The tables of ``gpu_step.py``."""

import argparse
from collections.abc import Sequence
from typing import Any

from measure import Spread, ratio
from report import Table

from gpu_cases.setting import Case
from gpu_cases.shapes import STUDENTS

GIB = 2**30
_CAPTIONS = {
    "train": "Training: CTPD from a score cache, {batch} pairs a step, microbatches of {microbatch_tokens} tokens, "
    "recompute {recompute}. Time of a whole step, median and quartiles; speed against bf16 step by step.",
    "score": "Scoring: a frozen teacher, {batch} pairs a step, microbatches of {scoring_tokens} tokens.",
}


def cases_table(part: str, cases: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    """One row a case of a part; rounds of one case are put together."""
    header = ["shape", "layers", "precision", "weights", "step, s", "tokens/s", "response tokens/s", "TFLOP/s"]
    header += ["matrix rate, TFLOP/s", "utilization", "peak memory, GiB", "speed / bf16"]
    measured = {case["case"]: case for case in together(cases)}
    rows = []
    for case, result in measured.items():
        if case.part != part:
            continue
        name = [case.shape, str(case.layers or "all"), case.precision]
        if "failed" in result:
            rows.append([*name, result["failed"], *[""] * 8])
            continue
        bf16 = measured.get(Case(case.part, case.shape, case.layers, "bf16"), {"failed": ""})
        speed = "" if "failed" in bf16 else ratio(_seconds(bf16), _seconds(result)).text(2)
        rows.append([*name, *_rates(result), f"{result['peak_bytes'] / GIB:.1f}", speed])
    return Table(_CAPTIONS[part].format(**vars(arguments)), header, rows)


def _rates(result: dict[str, Any]) -> list[str]:
    seconds, rate = sum(_seconds(result)), result["matrix_rate"]["flops_per_second"]
    tokens, response, flops = (_sum(result, name) for name in ("tokens", "response_tokens", "flops"))
    return [
        f"{result['parameters'] / 1e9:.2f}e9",
        Spread.of(_seconds(result)).text(),
        f"{tokens / seconds:,.0f}",
        f"{response / seconds:,.0f}",
        f"{flops / seconds / 1e12:,.2f}",
        f"{rate / 1e12:,.2f}",
        f"{flops / seconds / rate:.1%}",
    ]


def together(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a case: the steps of all its rounds, the mean of its matrix rates, its highest memory."""
    rounds: dict[Case, list[dict[str, Any]]] = {}
    for case in cases:
        rounds.setdefault(case["case"], []).append(case)
    whole = []
    for results in rounds.values():
        failed = [result for result in results if "failed" in result]
        if failed:
            whole.append(failed[0])
            continue
        rates = [result["matrix_rate"]["flops_per_second"] for result in results]
        whole.append(
            results[0]
            | {
                "steps": [step for result in results for step in result["steps"]],
                "matrix_rate": {"flops_per_second": sum(rates) / len(rates)},
                "peak_bytes": max(result["peak_bytes"] for result in results),
            }
        )
    return whole


def whole_models(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and operations of a step of the whole model, on the line through the two deepest that were trained."""
    depths: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in together(cases):
        case = result["case"]
        if case.part == "train" and case.layers and "failed" not in result:
            depths.setdefault((case.shape, case.precision), []).append(result)
    estimates = []
    for (shape, precision), results in depths.items():
        if len(results) < 2:
            continue
        shallow, deep = sorted(results, key=lambda result: result["case"].layers)[-2:]
        layers = [result["case"].layers for result in (shallow, deep)]
        whole = STUDENTS[shape]["num_hidden_layers"]

        def at_whole(values: Sequence[float], layers: Sequence[int] = tuple(layers), whole: int = whole) -> float:
            slope = (values[1] - values[0]) / (layers[1] - layers[0])
            return values[1] + slope * (whole - layers[1])

        seconds = at_whole([sum(_seconds(result)) for result in (shallow, deep)])
        flops = at_whole([_sum(result, "flops") for result in (shallow, deep)])
        estimates.append(
            {
                "shape": shape,
                "precision": precision,
                "measured_layers": layers,
                "layers": whole,
                "step_seconds": seconds / len(deep["steps"]),
                "tokens_per_second": _sum(deep, "tokens") / seconds,
                "utilization": flops / seconds / deep["matrix_rate"]["flops_per_second"],
            }
        )
    return estimates


def whole_table(cases: Sequence[dict[str, Any]]) -> Table:
    """One row an estimate."""
    caption = "Whole models that do not fit: an estimate, on the line through the two depths that were measured."
    rows = [
        [
            row["shape"],
            row["precision"],
            str(row["layers"]),
            " and ".join(map(str, row["measured_layers"])),
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['utilization']:.1%}",
        ]
        for row in whole_models(cases)
    ]
    header = ["shape", "precision", "layers", "measured at", "step, s", "tokens/s", "utilization"]
    return Table(caption, header, rows)


def head_table(hidden: int, results: dict[str, Any], arguments: argparse.Namespace) -> Table:
    """One row a side."""
    caption = (
        f"Log-prob head and DPO loss, forward and backward: hidden {hidden}, vocabulary {arguments.head_vocab:,}, "
        f"{8 * arguments.head_length:,} tokens. Memory beyond inputs and their gradients."
    )
    if "failed" in results:
        return Table(caption, ["failed"], [[results["failed"]]])
    rows = [
        [
            name,
            f"{1e3 * row['seconds'].median:.2f}",
            row["seconds_over_lean"].text(2),
            f"{row['peak_bytes_beyond'] / 2**20:,.0f}",
            f"{row['loss']:.5f}",
            f"{row['gradient_error']:.1e}",
        ]
        for name, row in results.items()
    ]
    return Table(caption, ["side", "ms", "time / lean", "MiB", "loss", "gradients from plain"], rows)


def _seconds(result: dict[str, Any]) -> list[float]:
    return [step["seconds"] for step in result["steps"]]


def _sum(result: dict[str, Any], name: str) -> float:
    return sum(step[name] for step in result["steps"])
