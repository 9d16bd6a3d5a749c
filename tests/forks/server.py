"""A process that has imported everything, and forks the ranks of one job after the other: each begins in no time.

Reads jobs from standard input, a JSON object a line, and answers with ``{"statuses": [...], "seconds": s, "left":
[...]}`` each, with the processes of a job, on Linux, that outlive its ranks by more than ten seconds; they are ended:

- ``program``: the script that every rank runs as ``__main__``; or ``function``, ``module:name``, which is called with
  the rank and the arguments.
- ``arguments``: its arguments.
- ``ranks``: how many there are. What one rank finds in its environment is what ``torchrun`` gives it, and when one
  dies the others get SIGTERM, and SIGKILL if they do not end: what ``torchrun`` does.
- ``environment``: all else that it finds there.
- ``folder``: the working folder.
- ``logs``: where standard output and error of a rank go, to ``rank-<rank>.log``; ``apart``: error to
  ``rank-<rank>.err``.
- ``fault``: ``null``, or which ``signal`` to send: to the ``targets``, ``seconds`` after the start or once ``file``
  has so many ``lines``, and with ``group`` to all that they have started; or to ``rank`` the ``nth`` time that it
  comes to a ``point``, see ``tests.faults.points``.
- ``spoil``: ``null``, or what goes wrong with numbers, or takes for ever, see ``tests.faults.spoil``.
- ``bound``: seconds that the whole job may take.
- ``grace``: seconds that ranks may take to end once they were asked to.

It begins with ``{"threads": [...]}``, the names of the threads that it has beside the first: what one of them has
locked when the process forks stays locked in the fork. When whoever started it ends, it ends all that it forked, and
itself.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parents[2]
_OUTLIVE = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLIENT = os.getppid()


def _import_all() -> None:
    from ctpd_nemo.pipeline import quiet

    quiet.before_imports()
    import datasets  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from nemo.core.config import hydra_runner  # noqa: F401

    import ctpd_nemo.convert.export
    import ctpd_nemo.evaluation.evaluate
    import ctpd_nemo.pipeline.score
    import ctpd_nemo.pipeline.stages
    import ctpd_nemo.report.run_page  # noqa: F401
    from tests.session import kernels

    kernels.choose()


def _threads() -> list[str]:
    """Of all threads, libraries' own among them, but the first."""
    others = {thread.id for thread in psutil.Process().threads()} - {os.getpid()}
    return sorted(Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in others)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _into(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _become(job: dict[str, Any], rank: int, port: int) -> None:
    """Take over a rank's streams, folder and environment."""
    logs = Path(job["logs"])
    os.dup2(_into(logs / f"rank-{rank}.log"), 1)
    os.dup2(_into(logs / f"rank-{rank}.err") if job["apart"] else 1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        os.environ.update({name: str(value) for name, value in world.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forks"})


def _work(job: dict[str, Any], rank: int) -> None:
    if job["spoil"]:
        from tests.faults import spoil

        spoil.install(job["spoil"], rank, Path(job["folder"]))
    fault = job["fault"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fault and fault.get("group"):
        os.setpgid(0, 0)
    if fault and "point" in fault and fault["rank"] == rank:
        from tests.faults import points

        points.install(fault, os.getpid())
    if "function" in job:
        module, _, name = job["function"].partition(":")
        getattr(importlib.import_module(module), name)(rank, *job["arguments"])
        return
    sys.argv = [job["program"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["program"]).parent))
    runpy.run_path(job["program"], run_name="__main__")


def _run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """In the fork: become a rank and never return."""
    status = 1
    try:
        _become(job, rank, port)
        _work(job, rank)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        # How it ends is settled: being asked to, as the others are once one has failed, changes nothing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # As at the end of any interpreter: forks that still write, for one, are waited for.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _supervise(job: dict[str, Any], pids: list[int]) -> list[int]:
    """Wait for all ranks; their exit statuses, negative for signals."""
    statuses: dict[int, int] = {}
    started, asked = time.monotonic(), None
    fault = job["fault"] or {}
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        left = [pids[rank] for rank in range(len(pids)) if rank not in statuses]
        if "targets" in fault and _is_due(fault, now - started):
            for target in fault.pop("targets"):
                if target not in statuses:
                    (os.killpg if fault.get("group") else os.kill)(pids[target], fault["signal"])
        failed = any(statuses.values())
        if left and asked is None and (failed or now - started > job["bound"]):
            asked = now
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        alone = os.getppid() != _CLIENT
        if left and (alone or (asked is not None and now - asked > job["grace"])):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[rank] for rank in range(len(pids))]


def _is_due(fault: dict[str, Any], seconds: float) -> bool:
    if "seconds" in fault:
        return bool(seconds >= fault["seconds"])
    file = Path(fault["file"])
    return file.exists() and file.read_bytes().count(b"\n") >= fault["lines"]


def _process_control(option: int, value: int) -> None:
    if sys.platform == "linux":
        assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def _end_orphans() -> list[str]:
    """Wait for what the ranks have left; what does not end by itself."""
    until = time.monotonic() + _OUTLIVE
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = psutil.Process().children(recursive=True)
        if not left or time.monotonic() > until:
            break
        time.sleep(0.005)
    told = [" ".join(process.cmdline()) or str(process) for process in left]
    for process in left:
        process.kill()
    return told


def main() -> None:
    # Processes whose parents have died are children of this one then.
    _process_control(_PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(_ROOT))
    _import_all()
    # What is there now is there in every fork: none of them shall copy its pages to count what refers to what.
    gc.freeze()
    print(json.dumps({"threads": _threads()}), file=answers, flush=True)
    for line in sys.stdin:
        job, port, pids = json.loads(line), _free_port(), []
        started = time.monotonic()
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                # Else whoever reads it would not hear of the end of this process before that of its ranks.
                os.close(answers.fileno())
                _process_control(_PR_SET_PDEATHSIG, signal.SIGKILL)
                _run_rank(job, rank, port)
            pids.append(pid)
        statuses = _supervise(job, pids)
        answer = {"statuses": statuses, "seconds": time.monotonic() - started, "left": _end_orphans()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
