"""Where CTPD's weights lie in the runs of tools/reproduce.py: on what two responses differ in, or on what they share.

    python benchmarks/weight_places.py runs/tables/tiny

Pairs whose rejected response has the wrong answer, and differs in it alone: the mean weight of spans that hold a byte
of the difference, beside that of the other spans; the last one, which ends the response, is left out. Beside it what
SFT has taught both models to prefer: the log-prob of chosen less rejected, as a mean over the pairs of a seed.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from report import Table, add_report_arguments, begin, write_report
from transformers import AutoTokenizer

from ctpd_nemo.losses.weights import exponential_weights
from ctpd_nemo.spans import align_batch

SIDES = ("chosen", "rejected")
# A cache and a role in it; that of the student is there once table 2 is.
MODELS = {"teacher after SFT": ("score", "reference"), "student after SFT": ("score_student", "student")}


def main() -> None:
    arguments = parse_arguments()
    begin(arguments)
    results, preferred = [], []
    for folder in sorted(arguments.run_dir.glob("seed-*")):
        for side in SIDES:
            results.append({"seed": folder.name, "response": side, **mean_weights(folder, side, arguments.pairs)})
        preferred.append({"seed": folder.name, **{name: preference(folder, *of) for name, of in MODELS.items()}})
    names = ("differ", "shared", "spans")
    weights = [[row["seed"], row["response"], *_cells(row, names), str(row["pairs"])] for row in results]
    header = ["seed", "response", "spans that differ", "other spans", "spans a response", "pairs"]
    margins = [[row["seed"], *_cells(row, MODELS)] for row in preferred]
    tables = [
        Table("Mean weight:", header, weights),
        Table("Log-prob of chosen less rejected, nats:", ["seed", *MODELS], margins),
    ]
    write_report("Where the weights lie", tables, {"weights": results, "preferred": preferred}, arguments)


def _cells(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return ["-" if row[name] is None else f"{row[name]:.2f}" for name in names]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run_dir of tools/reproduce.py")
    parser.add_argument("--pairs", type=int, default=1000, help="the first so many of each seed")
    add_report_arguments(parser)
    return parser.parse_args()


def mean_weights(folder: Path, side: str, n_pairs: int) -> dict[str, Any]:
    """Means over the wrong-answer pairs of a seed."""
    rows = [json.loads(line) for line in (folder / "world/train.jsonl").read_text().splitlines()[:n_pairs]]
    rows = [row for row in rows if row["fault"] == "wrong"]
    teacher, student = (AutoTokenizer.from_pretrained(folder / "world" / name) for name in ("teacher", "student"))
    scores = {role: read_scores(folder / "score/cache", role, side) for role in ("positive", "negative")}
    texts = {name: [row[name][0]["content"] for row in rows] for name in SIDES}
    other = SIDES[1 - SIDES.index(side)]
    found: dict[str, list[float]] = defaultdict(list)
    for row, text, beside, spans in zip(
        rows, texts[side], texts[other], align_batch(texts[side], teacher, student), strict=True
    ):
        ratios = torch.tensor(scores["positive"][row["id"]] - scores["negative"][row["id"]])
        weights = exponential_weights(ratios, 1.0 if side == "chosen" else -1.0).numpy()[: spans.n_spans]
        differs = holds(spans.bounds, *difference(text.encode(), beside.encode()))
        if differs.any() and not differs.all():
            found["differ"].append(float(weights[differs].mean()))
            found["shared"].append(float(weights[~differs].mean()))
            found["spans"].append(float(len(weights)))
    return {**{name: float(np.mean(values)) for name, values in found.items()}, "pairs": len(found["differ"])}


def preference(folder: Path, stage: str, role: str) -> float | None:
    """The mean margin of a model on a seed's pairs; ``None`` where no cache has the model."""
    chosen, rejected = (read_scores(folder / stage / "cache", role, side) for side in SIDES)
    return float(np.mean([chosen[pair].sum() - rejected[pair].sum() for pair in chosen])) if chosen else None


def read_scores(cache: Path, role: str, side: str) -> dict[str, NDArray[np.float32]]:
    """Log-probs of each pair's spans under a role."""
    shards = [pq.read_table(path) for path in sorted(cache.glob(f"{role}-*.parquet"))]
    return {
        pair: np.array(values, dtype=np.float32)
        for shard in shards
        for pair, values in zip(shard["pair_id"].to_pylist(), shard[side].to_pylist(), strict=True)
    }


def difference(text: bytes, other: bytes) -> tuple[int, int]:
    """Where a text differs from another: its bytes without the beginning and then the end that both share."""
    shortest = min(len(text), len(other))
    first = next((at for at in range(shortest) if text[at] != other[at]), shortest)
    last = next((at for at in range(shortest - first) if text[-1 - at] != other[-1 - at]), shortest - first)
    return first, len(text) - last


def holds(bounds: Sequence[int] | NDArray[Any], first: int, last: int) -> NDArray[np.bool_]:
    """Which spans between these bounds hold a byte from ``first`` to before ``last``."""
    edges = np.asarray(bounds)
    return (edges[:-1] < last) & (edges[1:] > first)


if __name__ == "__main__":
    main()
