"""Ctrl-C: once to stop at a good point, twice to stop at once, never for what runs in the background."""

import os
import signal
from collections.abc import Iterator

import pytest

from ctpd_nemo.pipeline.stopping import INTERRUPTED, TERMINATED, Stopped, StopRequest, stop_at_once, stopped


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As they are in a tool, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_the_job_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    request = StopRequest()
    request.listen()
    interrupt()
    assert request.received
    assert request.interrupted
    assert "once more, and at once" in capfd.readouterr().err
    with pytest.raises(Stopped, match=str(INTERRUPTED)):
        interrupt()


def test_sigterm_is_no_ctrl_c() -> None:
    request = StopRequest()
    request.listen()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.received
    assert not request.interrupted


@pytest.mark.parametrize(("ranks", "of_node", "status"), [(None, None, 0), ("2", "2", 0), ("4", "2", TERMINATED)])
def test_sigterm_ends_with_status_0_where_no_other_node_has_to_be_told(
    monkeypatch: pytest.MonkeyPatch, ranks: str | None, of_node: str | None, status: int
) -> None:
    for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", of_node)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert stopped("at step 1", interrupted=False).code == status
    assert stopped("at step 1", interrupted=True).code == INTERRUPTED


def test_ctrl_c_before_a_job_listens_ends_it_where_it_is() -> None:
    stop_at_once(0)
    with pytest.raises(Stopped) as end:
        interrupt()
    assert (end.value.code, end.value.message) == (INTERRUPTED, "stopped by Ctrl-C")


def test_what_a_shell_runs_in_the_background_ignores_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_at_once(0)
    request = StopRequest()
    request.listen()
    interrupt()
    assert not request.received
