"""What padding costs on real preference pairs, packed beside padded; and how evenly ranks share a step.

    python benchmarks/packing.py --pairs pairs.jsonl --tokenizers FOLDER FOLDER

Steps are made as training makes them, over one epoch of all pairs, on one rank. Padding is its share of the tokens
that are computed. Packed microbatches are of any length up to the budget, so what is left of the budget costs nothing;
the share of it that stays empty, which an implementation of fixed shapes would compute too, is given beside it.
Alignments: none; 16 tokens a microbatch (FP8); 32 a microbatch and 4 a sequence (FP8, with sequences cut over 2
context-parallel ranks).

Imbalance is what the rank with most has over the mean, less 1, in the mean over the full steps of an epoch: in cost,
which is time, in tokens, and in attention. Ranks share a step by known lengths, by lengths estimated from bytes of text
(pairs that are not encoded ahead), or take turns, pair by pair. The least is what no split of whole pairs can go below,
because some rank has the largest pair. Costs are those of a Llama-3.2-1B-shaped model.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import Table, add_report_arguments, begin, write_report
from transformers import AutoTokenizer

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.data.balance import split_by_rank
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.loader import Batching, StepStats, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.source import PairSource, TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.templates import Side
from ctpd_nemo.models.cost import sequence_cost

BOTH = ("chosen", "rejected")
# (microbatch, sequence) multiples.
ALIGNMENTS = {"none": (1, 1), "16": (16, 1), "32, sequences 4": (32, 4)}
COST = sequence_cost(
    Architecture(
        family="llama",
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        tied_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        sliding_window=None,
        rope_theta=5e5,
        inv_freq=(),
        dtype=None,
    )
)
MEASURES = ("cost", "tokens", "attention")


def main() -> None:
    arguments = parse_arguments()
    begin(arguments)
    dataset = open_preferences(arguments.pairs)
    padding, imbalance = [], []
    for folder in arguments.tokenizers:
        name = Path(folder).name
        encoder = PairEncoder(Side(AutoTokenizer.from_pretrained(folder)), None, True, arguments.max_length)
        with tempfile.TemporaryDirectory() as home:
            encoded = encode(Path(home), dataset, encoder, arguments.workers)
            padding += [{"tokenizer": name, **row} for row in measure_padding(dataset, encoder, encoded, arguments)]
            imbalance += [{"tokenizer": name, **row} for row in measure_imbalance(dataset, encoder, encoded, arguments)]
    tables = [padding_table(padding), imbalance_table(imbalance)]
    title = f"Packing: {len(dataset)} preference pairs, sequences of up to {arguments.max_length} tokens"
    write_report(title, tables, {"padding": padding, "imbalance": imbalance}, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True, help="preference files")
    parser.add_argument("--tokenizers", nargs="+", required=True, help="Hugging Face folders with chat templates")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4096, 16384], help="tokens of a microbatch")
    parser.add_argument("--global-batches", type=int, nargs="+", default=[16, 64, 256], help="pairs of a step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--pairs-per-rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize")
    add_report_arguments(parser)
    return parser.parse_args()


def encode(folder: Path, dataset: PreferenceDataset, encoder: PairEncoder, workers: int) -> EncodedDataset:
    """All pairs in tokens, to make steps of them many times."""
    manifest = Manifest.of(dataset, encoder)
    for _ in write_encoded(folder, manifest, TextSource(dataset, encoder), workers):
        pass
    return EncodedDataset(folder, manifest)


def measure_padding(
    dataset: PreferenceDataset, encoder: PairEncoder, encoded: EncodedDataset, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Padding of an epoch, by budget, global batch, packing and alignment."""
    rows = []
    for budget in arguments.budgets:
        for global_batch in arguments.global_batches:
            plan = StepPlan(len(dataset), global_batch)
            for padding, alignment in [("padded", "none"), *(("packed", alignment) for alignment in ALIGNMENTS)]:
                multiples = dict(zip(("pad_to_multiple", "sequence_multiple"), ALIGNMENTS[alignment], strict=True))
                batching = Batching(budget, padding=padding, cost=COST, **multiples)
                stats, microbatches = StepStats(), 0
                for step in build_step_loader(dataset, encoder, plan, batching, encoded=encoded):
                    stats += step.stats
                    microbatches += len(step.microbatches)
                rows.append(
                    {
                        "budget": budget,
                        "global_batch": global_batch,
                        "padding": padding,
                        "alignment": alignment,
                        "microbatches": microbatches,
                        "tokens": stats.tokens,
                        "padding_tokens": stats.padding,
                        "padding_share": stats.padding / (stats.tokens + stats.padding),
                        "budget_unused_share": 1 - stats.tokens / (microbatches * budget),
                    }
                )
    return rows


def measure_imbalance(
    dataset: PreferenceDataset, encoder: PairEncoder, encoded: EncodedDataset, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """How unevenly ranks share full steps, by ranks, pairs a rank, and the way of sharing."""
    text = TextSource(dataset, encoder)
    rows = []
    for ranks in arguments.ranks:
        for per_rank in arguments.pairs_per_rank:
            plan = StepPlan(len(dataset), ranks * per_rank)
            steps = [plan.batch(step)[1] for step in range(len(dataset) // plan.global_batch_size)]
            if not steps:
                continue
            ways: dict[str, Callable[[np.ndarray], list[list[int]]]] = {
                "known lengths": lambda batch, n=ranks: split_by_rank(*costs_of(encoded, batch)[::2], n),
                "bytes of text": lambda batch, n=ranks: split_by_rank(*costs_of(text, batch)[::2], n),
                "in turns": lambda batch, n=ranks: [list(range(rank, len(batch), n)) for rank in range(n)],
            }
            for way, split in ways.items():
                over = np.mean([over_mean(costs_of(encoded, batch), split(batch)) for batch in steps], axis=0)
                least = np.mean([least_over_mean(costs_of(encoded, batch), ranks) for batch in steps], axis=0)
                rows.append(
                    {"ranks": ranks, "pairs_per_rank": per_rank, "steps": len(steps), "way": way}
                    | dict(zip(MEASURES, over.tolist(), strict=True))
                    | dict(zip([f"least_{measure}" for measure in MEASURES], least.tolist(), strict=True))
                )
    return rows


def costs_of(source: PairSource, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cost, tokens and attention of each pair of a batch."""
    lengths_PR, response_PR = source.lengths(batch.tolist(), "policy", BOTH)
    parts = COST.of(lengths_PR, response_PR), lengths_PR, COST.query_key_pairs(lengths_PR)
    return tuple(part_PR.sum(axis=1) for part_PR in parts)


def over_mean(costs: Sequence[np.ndarray], ranks: list[list[int]]) -> list[float]:
    """Of each measure, what the rank with most has over the mean, less 1."""
    loads = [np.array([values[members].sum() for members in ranks]) for values in costs]
    return [float(load.max() / load.mean() - 1) for load in loads]


def least_over_mean(costs: Sequence[np.ndarray], ranks: int) -> list[float]:
    """Of each measure, what some rank must have over the mean, whatever the split: the largest pair."""
    return [max(0.0, float(values.max() * ranks / values.sum() - 1)) for values in costs]


def padding_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each tokenizer, budget and global batch."""
    keys = ("tokenizer", "budget", "global_batch")
    found = {tuple(row[key] for key in (*keys, "padding", "alignment")): row for row in rows}
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        padded, packed = found[(*key, "padded", "none")], [found[(*key, "packed", name)] for name in ALIGNMENTS]
        lines.append(
            [
                *map(str, key),
                f"{padded['padding_share']:.1%}",
                *(f"{row['padding_share']:.2%}" for row in packed),
                f"{packed[0]['budget_unused_share']:.1%}",
                f"{packed[0]['microbatches']} / {padded['microbatches']}",
            ]
        )
    aligned = [f"packed, aligned to {name}" for name in list(ALIGNMENTS)[1:]]
    header = ["tokenizer", "budget", "pairs a step", "padded", "packed", *aligned, "budget left empty, packed"]
    return Table("Padding, share of the tokens computed:", [*header, "microbatches, packed / padded"], lines)


def imbalance_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each tokenizer, number of ranks and way of sharing."""
    lines = []
    for row in rows:
        shares = [f"{row[measure]:.1%} ({row[f'least_{measure}']:.1%})" for measure in MEASURES]
        lines.append([row["tokenizer"], str(row["ranks"]), str(row["pairs_per_rank"]), row["way"], *shares])
    header = ["tokenizer", "ranks", "pairs a rank", "shared by", *MEASURES]
    return Table("Most of a rank over the mean of all, in brackets the least that is possible:", header, lines)


if __name__ == "__main__":
    main()
