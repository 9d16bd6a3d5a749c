"""The span score cache: what is written is read, by the run that it belongs to, and never by halves."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.data.encode import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.models.weighting import WEIGHTINGS
from ctpd_nemo.pipeline.score_cache import FINGERPRINTS, PairScores, ScoreReader, ScoreWriter, read_manifest
from ctpd_nemo.pipeline.score_sums import with_sums

PRINTS = {name: f"print of {name}" for name in FINGERPRINTS}
WEIGHTS = {role: f"weights of {role}" for role in ("reference", "positive", "negative")}
ALL_ROLES = tuple(ROLES)
CONTRASTIVE = CTPDConfig(scores="cache")
N_PAIRS, PAIRS_PER_SHARD = 7, 3


def writer(folder: Path, roles: tuple[str, ...] = tuple(WEIGHTS), **changed: Any) -> ScoreWriter:
    given: dict[str, Any] = {
        "fingerprints": PRINTS,
        "teacher_weights": {role: f"weights of {role}" for role in roles},
        "n_pairs": N_PAIRS,
        "pairs_per_shard": PAIRS_PER_SHARD,
    }
    return ScoreWriter(folder, **{**given, **changed})


def scores(role: str) -> list[PairScores]:
    """Made-up scores: pair 2 has one span, responses have unequal lengths, every number is another."""
    drawn = np.random.default_rng(list(role.encode()))
    return [
        PairScores(f"pair-{pair}", *(-drawn.gamma(2.0, size=length).astype(np.float32) for length in _lengths(pair)))
        for pair in range(N_PAIRS)
    ]


def encoded(pair_id: str) -> EncodedPair:
    """The pair of the scores: span s of a response has s % 3 + 1 tokens of the teacher, and one of the student."""
    number = int(pair_id.removeprefix("pair-"))
    lengths = _lengths(number) if number < N_PAIRS else (1, 1)

    def side(span: np.ndarray) -> SideTokens:
        return SideTokens(np.zeros(1, np.int32), np.zeros(len(span), np.int32), span.astype(np.int32))

    responses = [
        EncodedResponse(side(np.arange(n)), side(np.arange(n).repeat(np.arange(n) % 3 + 1)), np.arange(n + 1), n, False)
        for n in lengths
    ]
    return EncodedPair(number, pair_id, *responses)


def _lengths(pair: int) -> tuple[int, int]:
    return (1 + (3 * pair + 1) % 5, 1 + pair % 4) if pair != 2 else (1, 1)


def write_shard(cache: ScoreWriter, role: str, shard: int) -> None:
    cache.write(role, shard, scores(role)[shard * PAIRS_PER_SHARD : (shard + 1) * PAIRS_PER_SHARD])


def write_all(folder: Path, roles: tuple[str, ...] = tuple(WEIGHTS), **changed: Any) -> ScoreWriter:
    cache = writer(folder, roles, **changed)
    cache.begin()
    for role in roles:
        for shard in range(cache.n_shards):
            write_shard(cache, role, shard)
    return cache


def read(folder: Path, method: CTPDConfig | None = CONTRASTIVE, **changed: Any) -> ScoreReader:
    given: dict[str, Any] = {"fingerprints": PRINTS, "teacher_weights": WEIGHTS}
    return ScoreReader(folder, **{**given, **changed}, method=method)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
                expected /= np.arange(_lengths(number)[side == "rejected"]) % 3 + 1
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


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "positive-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"no positive-00001\.parquet.*finish scoring"):
        read(tmp_path)


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "negative-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"negative-00002\.parquet"):
        read(tmp_path)


def test_a_flipped_byte_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Every byte of a shard: those that no reader looks at may be any."""
    write_all(tmp_path, ("reference",))
    path, method = tmp_path / "reference-00001.parquet", CTPDConfig(scores="cache", weights="uniform")
    good = path.read_bytes()
    expected, found = scores("reference"), 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        try:
            cache = read(tmp_path, method)
        except InputError as error:
            found += path.name in str(error)
            continue
        assert len(cache) == N_PAIRS
        for pair in expected:
            chosen, rejected, *_ = cache.lookup(encoded(pair.pair_id))
            np.testing.assert_array_equal(chosen, pair.chosen, err_msg=f"byte {at}")
            np.testing.assert_array_equal(rejected, pair.rejected, err_msg=f"byte {at}")
    assert found > len(good) / 2


def test_a_pair_that_was_not_scored_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(InputError, match="reference: found no pair 'pair-99'"):
        read(tmp_path).lookup(encoded("pair-99"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_written(tmp_path: Path, value: float) -> None:
    cache = writer(tmp_path)
    cache.begin()
    bad = PairScores("pair-1", np.array([-1.0], np.float32), np.array([-1.0, -2.0, value], np.float32))
    with pytest.raises(InputError, match=r"positive-00000.parquet, pair 'pair-1', rejected, span 2: found .*finite"):
        cache.write("positive", 0, [scores("positive")[0], bad])
    assert set(files(tmp_path)) == {"manifest.json"}


def test_a_score_that_is_not_finite_is_never_read(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "negative-00001.parquet"
    table = pq.read_table(path)
    chosen = table["chosen"].to_pylist()
    chosen[1][0] = math.nan
    pq.write_table(with_sums(table.set_column(1, "chosen", [chosen]).cast(table.schema)), path)
    with pytest.raises(InputError, match=r"negative-00001.parquet, pair 'pair-4', chosen, span 0: found nan"):
        read(tmp_path)


def test_a_write_that_fails_midway_leaves_nothing_that_looks_like_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = writer(tmp_path)
    cache.begin()
    write_shard(cache, "reference", 0)
    before = files(tmp_path)

    def disk_full(table: Any, path: Path) -> None:
        path.write_bytes(b"PAR1 half a shard")
        # While it is being written it is there under another name.
        assert not (tmp_path / "reference-00001.parquet").exists()
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", disk_full)
        with pytest.raises(OSError, match="no space left"):
            write_shard(cache, "reference", 1)
    assert files(tmp_path) == before
    assert cache.missing(["reference"]) == [1, 2]


def test_what_a_killed_writer_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    cache.begin()
    (tmp_path / f"reference-00000.parquet.writing-{os.getpid()}").write_bytes(b"PAR1 half a shard")
    assert writer(tmp_path).missing(["reference"]) == [0, 1, 2]


def test_a_manifest_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, ("reference",))
    before = files(tmp_path)

    def cut_off(self: Path, text: str) -> None:
        self.write_bytes(text.encode()[:10])
        raise OSError("killed")

    adding = writer(tmp_path, ("positive", "negative"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut_off)
        with pytest.raises(OSError, match="killed"):
            adding.begin()
    assert files(tmp_path) == before
    assert json.loads(before["manifest.json"])["teacher_weights"] == {"reference": WEIGHTS["reference"]}


@pytest.mark.parametrize("role", ["reference", "student", "margin"])
def test_a_log_prob_above_zero_is_never_written_and_a_margin_may_be(role: str, tmp_path: Path) -> None:
    cache = writer(tmp_path, roles=ALL_ROLES)
    cache.begin()
    # What rounding makes of a span that is certain is let through.
    pairs = [PairScores("pair-0", np.array([1e-4], np.float32), np.array([-1.0, 0.5], np.float32))]
    if role == "margin":
        cache.write(role, 0, pairs)
        return
    with pytest.raises(InputError, match=f"{role}-00000.parquet, pair 'pair-0', rejected, span 1: found 0.5"):
        cache.write(role, 0, pairs)
    assert set(files(tmp_path)) == {"manifest.json"}


def test_a_log_prob_above_zero_is_never_read(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "positive-00002.parquet"
    table = pq.read_table(path)
    rejected = table["rejected"].to_pylist()
    rejected[0][-1] = 0.25
    pq.write_table(with_sums(table.set_column(2, "rejected", [rejected]).cast(table.schema)), path)
    last = len(rejected[0]) - 1
    with pytest.raises(InputError, match=f"positive-00002.parquet, pair 'pair-6', rejected, span {last}: found 0.25"):
        read(tmp_path)


def test_a_weight_that_is_not_finite_names_pair_and_span(tmp_path: Path) -> None:
    write_all(tmp_path)
    # 1e38 times e to the power of 80 is beyond fp32.
    method = dataclasses.replace(CONTRASTIVE, weight_scale=1e38, weight_upper=90.0, weight_lower=80.0)
    cache = ScoreReader(tmp_path, PRINTS, WEIGHTS, method)
    with pytest.raises(InputError, match="weights contrastive_teacher of pair 'pair-1', chosen, span 0: found inf"):
        cache.lookup(encoded("pair-1"))
