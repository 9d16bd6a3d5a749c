"""What a job of ``worker`` wrote down, put together from its ranks, and how far two such results are apart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """One job.

    Attributes:
        metrics: Of each optimizer step.
        microbatches: For each rank and step the dataset rows of each microbatch.
        gradients: Step -> Hugging Face name -> whole gradient.
        weights: Step -> Hugging Face name -> whole weight before that step.
    """

    metrics: list[dict[str, float]]
    microbatches: list[list[list[list[int]]]]
    gradients: dict[int, dict[str, Tensor]]
    weights: dict[int, dict[str, Tensor]]


def read(folder: Path) -> Observed:
    """Put the ranks of a job together."""
    files = sorted(folder.glob("observed-*.pt"))
    assert files, f"nothing was observed in {folder}"
    ranks: list[dict[str, Any]] = [torch.load(file) for file in files]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole: dict[str, dict[int, dict[str, Tensor]]] = {}
    for what in ("gradients", "weights"):
        whole[what] = {step: _whole([rank[what][step] for rank in ranks]) for step in ranks[0][what]}
    steps = [row for row in rows if "grad_norm" in row]
    return Observed(steps, [rank["microbatches"] for rank in ranks], whole["gradients"], whole["weights"])


def _whole(ranks: list[list[tuple[str, tuple[int, int], tuple[int, int] | None, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from blocks; blocks that several ranks hold must be the same, bit for bit."""
    blocks = [block for rank in ranks for block in rank]
    shapes: dict[str, list[int]] = {}
    for name, rows, columns, values in blocks:
        width = [columns[1]] if columns else list(values.shape[1:])
        shapes[name] = [max(a, b) for a, b in zip(shapes.get(name, [0, 0]), [rows[1], *width], strict=False)]
    tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for name, rows, columns, values in blocks:
        place = tensors[name][rows[0] : rows[1]]
        place = place[:, columns[0] : columns[1]] if columns else place
        unset = place.isnan()
        assert torch.equal(torch.where(unset, values, place), values), f"copies of {name} differ between ranks"
        place.copy_(values)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


def exported(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported Hugging Face folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], chance: Mapping[str, float] | None = None) -> float:
    """The largest relative distance in norm over the tensors, which must be the same ones.

    ``chance``: how far each may be off by what rounding decides.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    apart = {name: float((found[name].double() - expected[name].double()).norm()) for name in expected}
    return max(
        max(0.0, far - (chance or {}).get(name, 0.0)) / float(expected[name].norm()) for name, far in apart.items()
    )


def metric_distance(
    found: list[dict[str, float]], expected: list[dict[str, float]], chance: list[dict[str, float]] | None = None
) -> float:
    """The largest distance over steps and metrics of ``expected``, relative where a metric is above 1.

    ``chance``: how far each may be off by what rounding decides.
    """
    assert len(found) == len(expected)
    return max(
        max(0.0, abs(here[name] - value) - free.get(name, 0.0)) / max(1.0, abs(value))
        for here, there, free in zip(found, expected, chance or [{}] * len(expected), strict=True)
        for name, value in there.items()
    )
