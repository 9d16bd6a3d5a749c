"""The benchmark of teachers beside students and in caches, at toy size."""

import pytest

from tests.benchmarks.script import run_benchmark

TOY = ["--pairs", 4, "--batch", 2, "--max-length", 128, "--hidden", 16, "--layers", 1, "--steps", 3]
TOY += ["--teacher-hidden", 32, "--teacher-layers", 2, "--top-k", 20]


def distillation(world, folder, *sides):
    tokenizers = ["--student-tokenizer", world.student, "--teacher-tokenizer", world.teacher]
    options = [*TOY, *tokenizers, "--preferences", world.train, "--sides", *sides]
    return run_benchmark("distillation.py", folder, *options)["results"]


def test_the_cache_gives_what_the_teacher_beside_the_student_gives(world, tmp_path):
    results = distillation(world, tmp_path, "multilevel_ot_online", "multilevel_ot_cached")
    (row,) = results["losses"]
    # Half precision: a log-prob between -8 and -4 is off by 0.002 at most.
    assert 0 < row["largest_difference"] < 1e-2
    assert results["world"]["cached_bytes_per_token"] > 2 * 20


@pytest.mark.slow
def test_every_side_trains(world, tmp_path):
    results = distillation(world, tmp_path, "sft", "uld_whole", "uld_online", "uld_cached", "dskd")
    sides = results["sides"]
    assert sides["sft"]["more_bytes"] == 0
    entropies = [sides[name]["steps"][0]["cross_entropy"] for name in ("uld_whole", "uld_online", "uld_cached", "dskd")]
    assert entropies == pytest.approx(4 * [sides["sft"]["steps"][0]["loss"]], rel=1e-5)
