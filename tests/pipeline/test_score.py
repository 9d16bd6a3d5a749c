"""Scores are the same however the scoring is cut up: by model, by microbatch, by interruption."""

import gc
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models import scorer
from ctpd_nemo.models.teacher import FrozenModel
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline import score as score_module
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_world
from tests.rounding import of_model

ROLES = ("reference", "positive", "negative")
# Of log-probs of two models of two layers, whose products have sums of 48 terms at the most.
TOLERANCE = 2 * of_model(2, 48)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("score") / "world")


def scored(world: TinyWorld, cache: Path, **method: Any) -> Path:
    overrides = [
        f"model.student.path={world.student}",
        f"model.teacher.path={world.teacher}",
        f"data.train=[{world.train}]",
        f"run_dir={cache.parent / 'run'}",
        f"method.cache={cache}",
        "method.pairs_per_shard=10",
        # The student's weights would not do: its tokens are others.
        *(f"method.{role}={world.teacher}" for role in ROLES),
        *SMALL_BATCHES,
        *(f"{'' if '.' in key else 'method.'}{key}={value}" for key, value in method.items()),
    ]
    return score(run_config(composed("score", overrides)))


def content(cache: Path) -> dict[str, dict[str, Any]]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted(cache.glob("*.parquet"))}


def assert_close(cache: Path, other: Path) -> None:
    one, two = content(cache), content(other)
    assert sorted(one) == sorted(two) == sorted(f"{role}-{shard:05d}.parquet" for role in ROLES for shard in range(3))
    for name, table in one.items():
        assert table["pair_id"] == two[name]["pair_id"]
        for response in ("chosen", "rejected"):
            for mine, theirs in zip(table[response], two[name][response], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def together(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored(world, tmp_path_factory.mktemp("together") / "cache", together="true")


class Observed:
    """How often models were read, and how many were there at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        self.at_once: list[int] = []

        def counted(path: str, *rest: Any) -> FrozenModel:
            self.read.append(path)
            model = FrozenModel(path, *rest)
            self.at_once.append(sum(isinstance(thing, FrozenModel) for thing in gc.get_objects()))
            return model

        monkeypatch.setattr(scorer, "FrozenModel", counted)


def test_models_one_after_the_other_give_the_scores_of_all_at_once(
    world: TinyWorld, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    observed = Observed(monkeypatch)
    cache = scored(world, tmp_path / "cache", together="false")
    assert_close(cache, together)
    assert observed.read == [str(world.teacher)] * 3
    assert observed.at_once == [1, 1, 1], "each is freed before the next is read"


@pytest.mark.parametrize(("models", "at_once"), [(0.5, [1, 1, 1]), (2.5, [1, 2, 1]), (9, [1, 2, 3])])
def test_as_many_models_are_held_at_once_as_fit(
    models: float,
    at_once: list[int],
    world: TinyWorld,
    together: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.collect()
    observed = Observed(monkeypatch)
    weights = (world.teacher / "model.safetensors").stat().st_size
    # Three quarters of it are for weights.
    monkeypatch.setattr(score_module, "free_bytes", lambda: int(models * weights / 0.75))
    assert_close(scored(world, tmp_path / "cache"), together)
    assert observed.at_once == at_once
    assert len(observed.read) == 3, "each folder is read once"


@pytest.mark.parametrize("method", [{"microbatch_tokens": 1024}, {"data.microbatch_tokens": 4096}])
def test_scores_do_not_depend_on_the_microbatch(
    method: dict[str, int], world: TinyWorld, together: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        assert_close(scored(world, tmp_path / "cache", **method), together)
    (told,) = [record.getMessage() for record in caplog.records if ": scored " in record.getMessage()]
    (tokens,) = method.values()
    assert re.search(rf"; reference and positive and negative in one pass, {tokens} tokens a microbatch, \d+ ", told)


def test_scores_do_not_depend_on_encoding_ahead(world: TinyWorld, together: Path, tmp_path: Path) -> None:
    scored(world, tmp_path / "cache", **{"data.encoded": tmp_path / "encoded"})
    assert content(tmp_path / "cache") == content(together)
    assert len(list(tmp_path.glob("encoded/*/shard-00000/tokens.npy"))) == 1


def test_a_role_that_is_done_is_not_read_again(
    world: TinyWorld, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = scored(world, tmp_path / "cache", together="false")
    (cache / "positive-00001.parquet").unlink()
    (cache / "negative-00002.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in cache.glob("*.parquet")}
    observed = Observed(monkeypatch)
    scored(world, tmp_path / "cache", together="false")
    assert_close(cache, together)
    assert len(observed.read) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    scored(world, tmp_path / "cache")
    assert len(observed.read) == 2, "a cache that is whole is left alone"


def test_a_microbatch_that_holds_no_longest_pair_is_refused_before_anything_is_read(
    world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"method\.microbatch_tokens: found 255; expected at least 256"):
        scored(world, tmp_path / "cache", microbatch_tokens=255)
    assert not (tmp_path / "cache").exists()
