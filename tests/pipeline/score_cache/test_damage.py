"""The span score cache by halves, damaged, or with numbers that are none: never written, never taken."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.pipeline.score_cache import PairScores, ScoreReader
from ctpd_nemo.pipeline.score_sums import with_sums
from tests.pipeline.score_cache.made import (
    ALL_ROLES,
    CONTRASTIVE,
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


def rewrite(path: Path, side: str, pair: int, span: int, score: float) -> None:
    """Put another score into a shard, whose sums are right all the same."""
    table = pq.read_table(path)
    column = table[side].to_pylist()
    column[pair][span] = score
    changed = table.set_column(table.schema.get_field_index(side), side, [column])
    pq.write_table(with_sums(changed.cast(table.schema)), path)


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


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_flipped_byte_is_found_or_changes_nothing(every: int, tmp_path: Path) -> None:
    """Every byte of a shard, or every so many: those that no reader looks at may be any."""
    write_all(tmp_path, ("reference",))
    path, method = tmp_path / "reference-00001.parquet", CTPDConfig(scores="cache", weights="uniform")
    good = path.read_bytes()
    expected, found = scores("reference"), 0
    for at in range(0, len(good), every):
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
    assert found > len(good) / every / 2


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
    rewrite(tmp_path / "negative-00001.parquet", "chosen", pair=1, span=0, score=math.nan)
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
    last = span_counts(6)[1] - 1
    rewrite(tmp_path / "positive-00002.parquet", "rejected", pair=0, span=last, score=0.25)
    with pytest.raises(InputError, match=f"positive-00002.parquet, pair 'pair-6', rejected, span {last}: found 0.25"):
        read(tmp_path)


def test_a_weight_that_is_not_finite_names_pair_and_span(tmp_path: Path) -> None:
    write_all(tmp_path)
    # 1e38 times e to the power of 80 is beyond fp32.
    method = dataclasses.replace(CONTRASTIVE, weight_scale=1e38, weight_upper=90.0, weight_lower=80.0)
    cache = ScoreReader(tmp_path, PRINTS, WEIGHTS, method)
    with pytest.raises(InputError, match="weights contrastive_teacher of pair 'pair-1', chosen, span 0: found inf"):
        cache.lookup(encoded("pair-1"))
