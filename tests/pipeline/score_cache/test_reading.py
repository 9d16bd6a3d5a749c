"""The span score cache: what is written is read, by the run that it belongs to."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.weighting import WEIGHTINGS
from ctpd_nemo.pipeline.score_cache import FINGERPRINTS, read_manifest
from tests.pipeline.score_cache.made import (
    ALL_ROLES,
    N_PAIRS,
    PRINTS,
    WEIGHTS,
    encoded,
    files,
    read,
    scores,
    span_counts,
    write_all,
    write_shard,
    writer,
)


def test_the_reader_gives_back_every_score_bit_for_bit(tmp_path: Path) -> None:
    write_all(tmp_path)
    cache = read(tmp_path)
    assert len(cache) == N_PAIRS
    for pair in scores("reference"):
        chosen, rejected, *_ = cache.lookup(encoded(pair.pair_id))
        assert chosen.dtype == rejected.dtype == np.float32
        np.testing.assert_array_equal(chosen, pair.chosen)
        np.testing.assert_array_equal(rejected, pair.rejected)


def test_weights_are_those_of_section_3_4_with_mu_plus_one_for_chosen_and_minus_one_for_rejected(
    tmp_path: Path,
) -> None:
    k, lower, upper = 2.0, -0.3, 0.4
    write_all(tmp_path)
    cache = read(tmp_path, CTPDConfig(scores="cache", weight_scale=k, weight_lower=lower, weight_upper=upper))
    clamped = set()
    for positive, negative in zip(scores("positive"), scores("negative"), strict=True):
        _, _, *weights = cache.lookup(encoded(positive.pair_id))
        for found, mu, side in zip(weights, (1, -1), ("chosen", "rejected"), strict=True):
            for w, up, down in zip(found, getattr(positive, side), getattr(negative, side), strict=True):
                ratio = min(max(float(up) - float(down), lower), upper)
                clamped.add(ratio if ratio in (lower, upper) else "inside")
                assert w == pytest.approx(k * math.exp(mu * ratio), rel=1e-6)
    assert clamped == {lower, upper, "inside"}


def test_with_the_papers_settings_weights_stay_between_their_bounds(tmp_path: Path) -> None:
    write_all(tmp_path)
    cache = read(tmp_path)
    for pair in scores("positive"):
        _, _, chosen, rejected = cache.lookup(encoded(pair.pair_id))
        assert (chosen >= math.exp(-0.5) - 1e-6).all()
        assert (chosen <= math.exp(1.5) + 1e-5).all()
        assert (rejected >= math.exp(-1.5) - 1e-6).all()
        assert (rejected <= math.exp(0.5) + 1e-6).all()


@pytest.mark.parametrize("method", [None, CTPDConfig(scores="cache", weights="uniform")], ids=["dpo", "uniform"])
def test_without_a_contrastive_pair_every_weight_is_one(tmp_path: Path, method: CTPDConfig | None) -> None:
    write_all(tmp_path, ("reference",))
    cache = read(tmp_path, method)
    for pair in scores("reference"):
        chosen, rejected, chosen_weights, rejected_weights = cache.lookup(encoded(pair.pair_id))
        np.testing.assert_array_equal(chosen, pair.chosen)
        np.testing.assert_array_equal(chosen_weights, np.ones_like(chosen))
        np.testing.assert_array_equal(rejected_weights, np.ones_like(rejected))


@pytest.mark.parametrize(
    ("weights", "up", "down"),
    [
        ("contrastive_student", "student_positive", "student_negative"),
        ("teacher_student", "reference", "student"),
        ("single_teacher", "margin", None),
        ("average", "positive", "negative"),
    ],
)
def test_other_weightings_read_other_roles(tmp_path: Path, weights: str, up: str, down: str | None) -> None:
    write_all(tmp_path, ALL_ROLES)
    cache = read(tmp_path, CTPDConfig(scores="cache", weights=weights))
    lower_scores = scores(down) if down else [None] * N_PAIRS
    for number, (high, low) in enumerate(zip(scores(up), lower_scores, strict=True)):
        _, _, *found = cache.lookup(encoded(high.pair_id))
        for mu, side, own in zip((1, -1), ("chosen", "rejected"), found, strict=True):
            ratio = getattr(high, side).astype(float) - (getattr(low, side) if low else 0)
            expected = np.exp(mu * np.clip(ratio, -0.5, 1.5))
            if weights == "average":
                expected /= np.arange(span_counts(number)[side == "rejected"]) % 3 + 1
            np.testing.assert_allclose(own, expected, rtol=1e-5)


def test_with_the_student_for_reference_its_scores_are_the_references(tmp_path: Path) -> None:
    write_all(tmp_path, ("student",))
    cache = read(tmp_path, CTPDConfig(scores="cache", weights="random", reference_model="student"))
    assert len(cache) == N_PAIRS
    for pair in scores("student"):
        chosen, rejected, *_ = cache.lookup(encoded(pair.pair_id))
        np.testing.assert_array_equal(chosen, pair.chosen)
        np.testing.assert_array_equal(rejected, pair.rejected)


def test_two_caches_hold_the_roles_of_one(tmp_path: Path) -> None:
    whole, teachers, students = (tmp_path / name for name in ("whole", "teachers", "students"))
    write_all(whole, ALL_ROLES)
    write_all(teachers, ("reference", "positive", "negative", "margin"))
    write_all(students, ("student", "student_positive", "student_negative"))
    for weights in WEIGHTINGS:
        method = CTPDConfig(scores="cache", weights=weights)
        one, both = read(whole, method), read(teachers, method, more=[students])
        assert one.fingerprint == both.fingerprint
        for pair in (encoded(scored.pair_id) for scored in scores("reference")):
            for found, expected in zip(both.lookup(pair), one.lookup(pair), strict=True):
                np.testing.assert_array_equal(found, expected)


def test_a_second_cache_of_other_pairs_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path / "teachers")
    write_all(tmp_path / "students", ("student",), fingerprints={**PRINTS, "data": "another"})
    with pytest.raises(InputError, match=r"students/manifest\.json, data"):
        read(tmp_path / "teachers", more=[tmp_path / "students"])


def test_scores_of_another_number_of_spans_are_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    pair = dataclasses.replace(encoded("pair-4"), id="pair-5")
    with pytest.raises(InputError, match=r"reference, pair 'pair-5': found \[2, 2\] spans; expected \[4, 1\]"):
        read(tmp_path).lookup(pair)


def test_scoring_goes_on_at_the_first_missing_shard(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    assert cache.n_shards == 3
    assert cache.missing(WEIGHTS) == [0, 1, 2]
    cache.begin()
    for role in WEIGHTS:
        write_shard(cache, role, 0)
    # One role is ahead of the others: its shard is not whole yet.
    write_shard(cache, "reference", 1)
    again = writer(tmp_path)
    again.begin()
    assert again.missing(WEIGHTS) == [1, 2]
    assert again.missing(["reference"]) == [2]
    before = files(tmp_path)
    for role in WEIGHTS:
        for shard in again.missing([role]):
            write_shard(again, role, shard)
    assert again.missing(WEIGHTS) == []
    assert files(tmp_path).items() >= before.items()
    assert len(read(tmp_path)) == N_PAIRS


def test_a_second_job_adds_roles_and_keeps_the_first_ones(tmp_path: Path) -> None:
    write_all(tmp_path, ("reference",))
    before = files(tmp_path)
    write_all(tmp_path, ("positive", "negative"))
    after = files(tmp_path)
    assert after["reference-00000.parquet"] == before["reference-00000.parquet"]
    assert read_manifest(tmp_path)["teacher_weights"] == WEIGHTS
    assert read(tmp_path).lookup(encoded("pair-0"))


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_run_with_another_fingerprint_stops_with_its_name(tmp_path: Path, name: str) -> None:
    write_all(tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError) as reading:
        read(tmp_path, fingerprints={**PRINTS, name: "another"})
    with pytest.raises(InputError) as writing:
        writer(tmp_path, fingerprints={**PRINTS, name: "another"})
    for error in (reading.value, writing.value):
        assert error.place == f"{tmp_path}/manifest.json, {name}"
        assert error.found == PRINTS[name]
        assert "another" in error.expected
    assert files(tmp_path) == before


@pytest.mark.parametrize("role", WEIGHTS)
def test_a_run_with_another_teacher_stops_with_the_role(tmp_path: Path, role: str) -> None:
    write_all(tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"teacher_weights\.{role}: found weights of {role}; expected another"):
        read(tmp_path, teacher_weights={**WEIGHTS, role: "another"})
    with pytest.raises(InputError, match=rf"teacher_weights\.{role}: found weights of {role}; expected another"):
        writer(tmp_path, teacher_weights={role: "another"})
    assert files(tmp_path) == before


def test_a_run_without_the_teachers_weights_can_read_the_cache(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert len(read(tmp_path, teacher_weights={})) == N_PAIRS


@pytest.mark.parametrize("changed", [{"n_pairs": 8}, {"pairs_per_shard": 2}], ids=["pairs", "pairs_per_shard"])
def test_a_job_that_cuts_shards_in_another_way_does_not_touch_the_cache(tmp_path: Path, changed: dict) -> None:
    write_all(tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError, match=next(iter(changed)).removeprefix("n_")):
        writer(tmp_path, **changed)
    assert files(tmp_path) == before


def test_no_cache_at_all_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json.*tools/score\.py"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["not JSON", "[1]", '{"format": 99}'])
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, "negative, for method.weights"),
        ({"weights": "single_teacher"}, "margin, for method.weights"),
        ({"weights": "uniform", "reference_model": "student"}, "student, for the reference"),
    ],
)
def test_a_role_that_was_never_scored_is_named(tmp_path: Path, method: dict[str, str], expected: str) -> None:
    write_all(tmp_path, ("reference", "positive"))
    with pytest.raises(InputError) as error:
        read(tmp_path, CTPDConfig(scores="cache", **method))
    assert error.value.found == "roles ['positive', 'reference']"
    assert error.value.expected == expected
