"""The side-by-side benchmark at toy size: all of it runs, and sides that should compute the same do."""

import pytest

from tests.benchmarks.script import run_benchmark

STEPS = 3
TOY = ["--pairs", 8, "--batch", 4, "--max-length", 128, "--hidden", 16, "--layers", 1, "--steps", STEPS]
# So large that losses move, and equal losses mean equal steps.
TOY += ["--learning-rate", 1e-2]


def methods(world, folder, *sides):
    tokenizers = ["--student-tokenizer", world.student, "--teacher-tokenizer", world.teacher]
    return run_benchmark(
        "methods.py",
        folder,
        *TOY,
        *tokenizers,
        "--preferences",
        world.train,
        "--sides",
        *sides,
        "--learning-rate",
        1e-2,
    )["results"]


def test_ctpd_from_the_cache_is_the_plain_ctpd(world, tmp_path):
    results = methods(world, tmp_path, "ctpd_cached", "plain_ctpd")
    (row,) = results["losses"]
    assert row["sides"] == ["ctpd_cached", "plain_ctpd"]
    assert row["loss_difference"] < 1e-4
    losses = [step["loss"] for step in results["sides"]["plain_ctpd"]["steps"]]
    assert abs(losses[-1] - losses[0]) > 1e-2
    check_rates(results)


def check_rates(results):
    tokens = results["tokens"][1:]
    assert len(tokens) == STEPS - 1
    for side in results["sides"].values():
        seconds = sum(side["seconds"][1:])
        assert side["tokens_per_second"] == pytest.approx(sum(step["all"] for step in tokens) / seconds)
        assert side["response_tokens_per_second"] == pytest.approx(sum(step["response"] for step in tokens) / seconds)
        assert side["process_bytes"] > side["idle_bytes"] > 2**27


@pytest.mark.slow
def test_every_side_computes_what_its_equals_do(world, tmp_path):
    pytest.importorskip("trl", reason="needs the extra bench")
    results = methods(world, tmp_path, "dpo_cached", "ctpd_cached", "ctpd_online", "trl_dpo", "plain_ctpd")
    assert [row["sides"] for row in results["losses"]] == [
        ["dpo_cached", "trl_dpo"],
        ["ctpd_cached", "ctpd_online"],
        ["ctpd_cached", "plain_ctpd"],
    ]
    assert all(row["loss_difference"] < 1e-4 for row in results["losses"])
    # The policy starts as its own reference.
    assert results["sides"]["dpo_cached"]["steps"][0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    check_rates(results)
