"""How fast a run is, on clocks that tests wind: falls by half are told once, and nothing else is."""

import datetime
import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from ctpd_nemo.pipeline import pace
from ctpd_nemo.pipeline.pace import Clock, Pace, PaceWatch


def told(pace: Pace, steps: Iterable[tuple[int, float]]) -> list[str]:
    return [change for step in steps if (change := pace.add(*step))]


def steady(seconds: float = 10.0, steps: int = 40) -> list[tuple[int, float]]:
    return [(1000, seconds)] * steps


def test_a_fall_by_half_is_told_once_however_long_it_lasts() -> None:
    assert told(Pace(), [*steady(), *steady(21.0, 400)]) == ["fell"]


def test_a_fall_after_a_recovery_is_told_again() -> None:
    watched = Pace()
    assert told(watched, [*steady(), *steady(25.0), *steady(), *steady(25.0)]) == ["fell", "recovered", "fell"]
    assert watched.last_window == 40.0
    assert watched.usual == 100.0, "what is slow is not usual"


def test_less_than_half_is_not_reached_by_what_is_just_slower() -> None:
    assert told(Pace(), [*steady(), *steady(19.0, 400)]) == []


def test_a_rate_that_sways_about_the_limit_is_told_once() -> None:
    sway = [*steady(21.0, 5), *steady(18.0, 5)] * 10
    assert told(Pace(), [*steady(), *sway]) == ["fell"]


def test_first_steps_are_nothing_to_compare_with() -> None:
    compiled = [(1000, 0.1)] * 5
    assert told(Pace(), [*compiled, *steady()]) == []


def test_a_single_slow_step_is_no_fall() -> None:
    assert told(Pace(), [*steady(), (1000, 30.0), *steady()]) == []


def test_windows_of_short_steps_are_long_enough_to_mean_something() -> None:
    """20 ms a step: a pause of two seconds is a tenth of a window."""
    watched = Pace()
    assert told(watched, [*steady(0.02, 8000), (1000, 2.0), *steady(0.02, 8000)]) == []
    assert told(watched, steady(0.05, 2000)) == ["fell"]


def test_tokens_count_and_not_steps() -> None:
    """Half the tokens in half the time are no fall; half of them in the same time are."""
    assert told(Pace(), [*steady(), *[(500, 5.0)] * 40]) == []
    assert told(Pace(), [*steady(), *[(490, 10.0)] * 40]) == ["fell"]


def test_there_is_no_rate_before_there_was_a_step() -> None:
    watched = Pace()
    assert (watched.rate, watched.usual) == (None, None)
    watched.add(300, 2.0)
    assert (watched.rate, watched.usual) == (150.0, None)


class Run:
    """Steps of a trainer on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
        self.now = 0.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        self.watch = PaceWatch("run")
        self.trainer: Any = SimpleNamespace(global_step=0, is_global_zero=rank == 0)
        self.model: Any = SimpleNamespace(last_stats=SimpleNamespace(tokens=1000))

    def steps(self, count: int, seconds: float, between: float = 0.0) -> None:
        """So many steps; ``between`` is what a validation or checkpoint after each takes."""
        for _ in range(count):
            self.now += seconds
            self.trainer.global_step += 1
            self.watch.on_train_batch_end(self.trainer, self.model, None, None, 0)
            if between:
                self.watch.on_validation_start(self.trainer, self.model)
                self.watch.on_save_checkpoint(self.trainer, self.model, {})
                self.now += between


def test_the_warning_names_step_and_rates(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(monkeypatch)
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        run.steps(40, 10.0)
        run.steps(40, 40.0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "run           step 46: tokens/s fell to 25, less than half of the usual 100")
    ]


def test_validations_and_checkpoints_are_no_falls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(monkeypatch)
    run.steps(40, 10.0)
    run.steps(40, 10.0, between=500.0)
    run.steps(40, 10.0)
    assert not caplog.records
    assert run.watch.pace.rate == pytest.approx(100.0)


def test_one_rank_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(monkeypatch, rank=1)
    run.steps(40, 10.0)
    run.steps(40, 40.0)
    assert not caplog.records


def test_the_time_left_goes_by_what_was_done_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    clock = Clock()
    clock.start(60)
    assert clock.time_left(60, 100) is None
    now = 130.0
    assert clock.time_left(70, 100) == datetime.timedelta(seconds=90)
    assert clock.time_left(100, 100) == datetime.timedelta(0)
