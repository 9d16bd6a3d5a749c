"""The benchmarks of single parts at toy size."""

import pytest

from tests.benchmarks.script import run_benchmark


def test_alignment_is_measured_for_every_ordered_pair_of_tokenizers(world, tmp_path):
    options = ["--tokenizers", world.teacher, world.student, "--limit", 8, "--batch-sizes", 4, "--repeats", 1]
    pairs = run_benchmark("alignment.py", tmp_path, *options)["results"]["pairs"]
    assert [(row["teacher"], row["student"]) for row in pairs] == [("teacher", "student"), ("student", "teacher")]
    for row in pairs:
        assert row["align_over_tokenize"] == pytest.approx(row["align_ms"] / row["tokenize_ms"])


def test_both_sides_of_logprobs_agree(tmp_path):
    options = ["--vocab", 300, "--tokens", 40, "--hidden", 16, "--turns", 2]
    (row,) = run_benchmark("logprobs.py", tmp_path, *options)["results"]
    assert row["error"] < 1e-5
    assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {"plain": 2, "lean": 2}


def test_packing_pads_less_than_padding_and_loses_no_token(world, tmp_path):
    options = ["--pairs", world.train, "--tokenizers", world.student, "--max-length", 128, "--budgets", 256]
    options += ["--global-batches", 8, "--ranks", 2, "--pairs-per-rank", 4, "--workers", 0]
    results = run_benchmark("packing.py", tmp_path, *options)["results"]
    padded, *packed = results["padding"]
    assert padded["padding"] == "padded"
    assert {row["tokens"] for row in packed} == {padded["tokens"]}
    assert packed[0]["padding_tokens"] == 0 < packed[1]["padding_tokens"] < padded["padding_tokens"]
    for row in results["imbalance"]:
        assert row["cost"] >= row["least_cost"] - 1e-9
