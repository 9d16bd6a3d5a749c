"""The same under ``torchrun`` itself: it sees a rank die and ends the others, passes signals on, and may be killed."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults.conftest import Account, Zygote
from tests.faults.jobs import BOUND, Job, rows, steps_done, training, whole_checkpoints
from tests.pipeline.tool import started

STEPS = 60


def long_training(zygote: Zygote, world: TinyWorld, folder: Path) -> Job:
    job = training(zygote, world, folder, 2, async_save=True)
    changes = [f"trainer.max_steps={STEPS}", "trainer.epochs=100", "trainer.checkpoint_every=5", "data.validation=[]"]
    folder.mkdir(parents=True)
    return Job(zygote, folder, job.tool, [*job.arguments, *changes], job.ranks)


def workers(torchrun: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks among the processes below, once they are at work."""
    below = psutil.Process(torchrun.pid).children()
    return [process for process in below if any("train.py" in part for part in process.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "to", ["one rank: kill", "torchrun: kill", "all ranks: stop", "torchrun: stop", "torchrun: Ctrl-C"]
)
def test_a_job_under_torchrun_that_ends_before_its_time_goes_on_bit_for_bit(
    to: str, zygote: Zygote, world: TinyWorld, account: Account, tmp_path: Path
) -> None:
    never = long_training(zygote, world, tmp_path / "never")
    never.run()
    job = long_training(zygote, world, tmp_path / "ended")
    run_dir = job.folder / "run"
    with started(job.tool, job.arguments, job.folder, processes=2) as torchrun:
        while steps_done(run_dir) < 7:
            assert torchrun.poll() is None, torchrun.communicate()
            time.sleep(0.01)
        ranks = workers(torchrun)
        begun = time.monotonic()
        if to == "torchrun: stop":
            torchrun.send_signal(signal.SIGTERM)
        elif to == "torchrun: Ctrl-C":
            torchrun.send_signal(signal.SIGINT)
        elif to == "torchrun: kill":
            torchrun.send_signal(signal.SIGKILL)
        for number, worker in enumerate(ranks):
            if to == "all ranks: stop":
                worker.send_signal(signal.SIGTERM)
            elif to == "one rank: kill" and number == 1:
                worker.kill()
        _, stderr = torchrun.communicate(timeout=BOUND)
        seconds = time.monotonic() - begun
        assert len(ranks) == 2
        assert not psutil.wait_procs(ranks, timeout=BOUND)[1], "ranks that outlive torchrun"
    # Of a signal to itself, and of a rank that died, torchrun makes an error of its own.
    assert (torchrun.returncode == 0) == (to == "all ranks: stop"), stderr
    done, kept = steps_done(run_dir), whole_checkpoints(run_dir)
    assert done < STEPS
    if to.endswith("kill"):
        account.killed.append(f"train.py under torchrun, {to.partition(':')[0]}, after step 7")
        account.steps_again.append(done - max(kept, default=0))
    else:
        account.stopped.append(seconds)
        assert max(kept) == done
    job.run()
    assert rows(run_dir) == rows(never.folder / "run")
