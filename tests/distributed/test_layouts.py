"""Loss, gradients, metrics and updates are those of plain PyTorch in one process, and of one process in any layout.

One process runs padded with one pair a microbatch; everything else runs packed unless its name says otherwise. Each
job trains two steps: of 5 pairs and of 1.
"""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.distributed import plain, plain_weights
from tests.distributed.conftest import Launches
from tests.distributed.jobs import LAYOUTS, NUM_STEPS, VARIANTS
from tests.distributed.results import Observed, distance, exported, metric_distance, read
from tests.distributed.world import MAX_LENGTH, TOLERANCE

Plain = Callable[[str], plain.Trained]


def _trained(*, processes: int | None = None) -> list:
    """Layout and method of every training job, the slow ones marked."""
    return [
        pytest.param(name, method, marks=[pytest.mark.slow] if layout.slow else [], id=f"{name}-{method}")
        for name, layout in LAYOUTS.items()
        for method in layout.methods
        if not method.startswith("score") and layout.precision == "fp32" and processes in (None, layout.processes)
    ]


def job(launches: Launches, layout: str, method: str) -> Observed:
    return read(launches.layout(layout) / method)


def at_reference(method: str) -> bool:
    """Whether the policy begins as its reference."""
    return method.startswith(("dpo", "same", "student_", "tis_dpo"))


def expected_metrics(trained: plain.Trained, method: str) -> list[dict[str, float]]:
    """All metrics, but the accuracy where policy and reference are equal: every margin is zero but for rounding."""
    return [
        {
            name: value
            for name, value in metrics.items()
            if not (at_reference(method) and step == 0 and name == "accuracy")
        }
        for step, metrics in enumerate(trained.metrics)
    ]


@pytest.mark.parametrize(("layout", "method"), _trained())
def test_every_step_has_the_metrics_of_plain_pytorch(
    layout: str, method: str, launches: Launches, plain_run: Plain
) -> None:
    found = job(launches, layout, method)
    assert metric_distance(found.metrics, expected_metrics(plain_run(method), method)) < TOLERANCE


@pytest.mark.parametrize(("layout", "method"), _trained())
def test_gradients_are_those_of_plain_pytorch(layout: str, method: str, launches: Launches, plain_run: Plain) -> None:
    found = job(launches, layout, method)
    for step in range(NUM_STEPS):
        assert distance(found.gradients[step], plain_run(method).gradients[step]) < TOLERANCE


@pytest.mark.parametrize(("layout", "method"), _trained())
def test_weights_after_two_steps_are_those_of_plain_adamw(
    layout: str, method: str, launches: Launches, plain_run: Plain
) -> None:
    found = exported(launches.layout(layout) / method / "export")
    assert distance(found, plain_run(method).weights) < TOLERANCE


@pytest.mark.parametrize(("layout", "method"), _trained())
def test_loss_and_gradients_are_those_of_one_process(layout: str, method: str, launches: Launches) -> None:
    alone = "one" if method in LAYOUTS["one"].methods else "one-packed-variants"
    found, one = job(launches, layout, method), job(launches, alone, method)
    losses = [[{"loss": row["loss"]} for row in run.metrics] for run in (found, one)]
    # Each is off by rounding.
    assert metric_distance(*losses) < 2 * TOLERANCE
    for step in range(NUM_STEPS):
        assert distance(found.gradients[step], one.gradients[step]) < 2 * TOLERANCE


def _both_ways() -> list:
    """Layout, and a job that reads scores from the cache and one that makes them, of the same method."""
    pairs = {"ctpd": "online", "tis_dpo-cached": "tis_dpo", **{name: f"{name}-online" for name in VARIANTS}}
    return [
        pytest.param(name, *pair, marks=[pytest.mark.slow] if layout.slow else [], id=f"{name}-{pair[0]}")
        for name, layout in LAYOUTS.items()
        for pair in pairs.items()
        if set(pair) <= set(layout.methods)
    ]


@pytest.mark.parametrize(("layout", "from_cache", "beside"), _both_ways())
def test_cached_and_online_models_give_the_same_step(
    layout: str, from_cache: str, beside: str, launches: Launches
) -> None:
    cached, online = job(launches, layout, from_cache), job(launches, layout, beside)
    names = ("loss", "margin", "reward_chosen", "reward_rejected", "grad_norm")
    rows = [[{name: row[name] for name in names} for row in run.metrics] for run in (cached, online)]
    # Each is off by rounding.
    assert metric_distance(*rows) < 2 * TOLERANCE
    for step in range(NUM_STEPS):
        assert distance(cached.gradients[step], online.gradients[step]) < 2 * TOLERANCE


@pytest.mark.parametrize(("layout", "method"), [case for case in _trained() if at_reference(case.values[1])])
def test_first_loss_is_ln_2_where_the_policy_is_its_reference(layout: str, method: str, launches: Launches) -> None:
    first = job(launches, layout, method).metrics[0]
    # Rewards of the cache were computed in other microbatches: sums over up to 66 tokens of about ln 120, times beta.
    off = 0.1 * 2 * MAX_LENGTH * math.log(120) * TOLERANCE
    assert first["margin"] == pytest.approx(0, abs=off)
    assert first["loss"] == pytest.approx(math.log(2), abs=off / 2)


# By methods whose weights are logged, the weighting; that of TIS-DPO has weights of tokens.
LOGGED = {
    "ctpd": "contrastive_teacher",
    "online": "contrastive_teacher",
    "random": "random",
    "random-online": "random",
    "tis_dpo": None,
    "tis_dpo-cached": None,
}


@pytest.mark.parametrize(("layout", "method"), [case for case in _trained() if case.values[1] in LOGGED])
def test_logged_weights_are_those_of_plain_pytorch(layout: str, method: str, launches: Launches) -> None:
    """Of the whole batch, once each, whatever ranks hold them."""
    found, home = job(launches, layout, method), launches.home
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    edges = [-np.inf, -1, -0.5, 0, *(2 ** (half / 2 - 3) for half in range(13)), np.inf]
    names = ["-inf", *(f"{edge:.3g}" for edge in edges[1:-1])]
    # Steps are of pairs 0 to 4, and then of pair 5.
    for step, batch in enumerate((rows[:5], rows[5:])):
        for side in ("chosen", "rejected"):
            kind = LOGGED[method]
            own = [
                plain_weights.weights(kind, home, row, side) if kind else plain_weights.token_weights(home, row, side)
                for row in batch
            ]
            counts, _ = np.histogram(np.concatenate(own), edges)
            expected = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
            assert found.metrics[step]["weights"][side] == expected


def test_first_loss_is_ln_2_in_bf16(launches: Launches) -> None:
    rows = read(launches.layout("one-bf16") / "dpo").metrics
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_bf16_stays_near_fp32(launches: Launches, plain_run: Plain) -> None:
    found, expected = job(launches, "one-bf16", "online"), plain_run("ctpd")
    assert found.metrics[0]["loss"] == pytest.approx(expected.metrics[0]["loss"], rel=2e-2)
    # Rounding alone: 0.06 to 0.27, as the tokenizers' training comes out. A missing term or scale would be above 0.5.
    assert distance(found.gradients[0], expected.gradients[0]) < 0.4


def test_padded_runs_hold_one_pair_a_microbatch_and_packed_ones_more(launches: Launches) -> None:
    padded, packed = (job(launches, layout, "dpo").microbatches[0] for layout in ("one", "one-packed"))
    assert [sorted(step) for step in padded] == [[[0], [1], [2], [3], [4]], [[5]]]
    assert len(packed[0]) < 5
    assert sorted(row for microbatch in packed[0] for row in microbatch) == [0, 1, 2, 3, 4]


def test_data_parallel_ranks_share_an_odd_number_of_pairs_and_then_a_single_one(launches: Launches) -> None:
    first, second = job(launches, "dp2", "ctpd").microbatches
    pairs = [sorted(row for microbatch in rank[0] for row in microbatch) for rank in (first, second)]
    assert sorted(map(len, pairs)) == [2, 3]
    assert sorted(pairs[0] + pairs[1]) == [0, 1, 2, 3, 4]
    assert len(first[0]) == len(second[0]), "ranks step together"
    assert sorted([first[1], second[1]]) == [[[]], [[5]]]
