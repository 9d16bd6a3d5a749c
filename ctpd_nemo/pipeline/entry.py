"""How the tools begin and end: Hydra in front; one line and status 2 behind, where the input is at fault."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.launcher import end_with_launcher
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.stopping import TERMINATED, Stopped, stop_at_once

Task = Callable[[DictConfig], Any]

# Tools that, started again, go on where they were: nothing is lost where they are asked to stop.
_GO_ON = ("train", "score", "pipeline", "quickstart")


def tool(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """A command-line tool: NeMo's ``hydra_runner`` over ``conf/<config_name>.yaml`` beside the tool's folder.

    An ``InputError`` of the task becomes one line on standard error and exit status 2, and so does a command line that
    Hydra cannot apply, and a path that cannot be read or written.
    """

    def decorate(task: Task) -> Callable[[], None]:
        composed = False

        @functools.wraps(task)
        def guarded(config: DictConfig) -> None:
            nonlocal composed
            composed = True
            quiet.after_imports()
            try:
                run(task, config)
            except Exception as error:
                from ctpd_nemo.pipeline.failures import fail

                fail(error, config.get("run_dir"))
                sys.exit(1)

        @functools.wraps(task)
        def main() -> None:
            stop_at_once(0 if config_name in _GO_ON else TERMINATED)
            end_with_launcher()
            quiet.before_imports()
            # Before Blackwell, what overlaps with communication needs kernels to start in the order they were queued in
            # (Megatron-Core); CUDA reads it once.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            _log_to_terminal()
            import torch.distributed as dist
            from nemo.core.config import hydra_runner

            conf = Path(task.__code__.co_filename).resolve().parents[1] / "conf"
            # Hydra is to raise what is wrong with a command line, not to end the process with its own words.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            try:
                name = _from_run() if config_name == "train" else None
                hydra_runner(config_path=str(conf), config_name=name or config_name)(guarded)()
            except InputError as error:
                stop(error)
            except Exception as error:
                if composed:
                    raise
                expected = (
                    "key=value, for keys and choices in conf, or \"key='value'\" where one has characters of Hydra's"
                )
                stop(InputError("command line", str(error), expected))
            # At the end of a process NCCL complains of groups that are still there.
            if dist.is_initialized():
                dist.destroy_process_group()

        return main

    return decorate


def run(task: Task, config: DictConfig) -> None:
    """Run a tool's task; end the process where its input is at fault."""
    try:
        task(config)
    except InputError as error:
        stop(error)
    except Stopped as stopped:
        logging.getLogger(__name__).info("%s", stopped.message)
        raise
    except OmegaConfBaseException as error:
        # A reference, ${...}, to what is not there is found where the value is read.
        message = str(error.msg or error).splitlines()[0]
        stop(InputError(str(error.full_key or "command line"), message, "a value"))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        # A library's error over an open file that cannot grow may have no name of it.
        place = config.get("run_dir") or "disk" if error.filename is None else os.fsdecode(error.filename)
        stop(InputError(str(place), str(error.strerror), "room to write" if full else "a path that can be used"))


def stop(error: InputError) -> None:
    """End the process over bad input; of all processes that meet some, one says what it is."""
    from ctpd_nemo.pipeline.failures import is_first, tell_launcher

    if is_first():
        print(f"error: {error}", file=sys.stderr)
    tell_launcher("bad input: see the line that begins with error:")
    sys.exit(2)


def _from_run() -> str | None:
    """With ``--from-run`` the name of that run's config; the flag is taken off the command line, which Hydra reads."""
    from ctpd_nemo.pipeline.again import offer_config, take_flag

    folder, sys.argv[1:] = take_flag(sys.argv[1:])
    return None if folder is None else offer_config(folder)


class _AboveBars(logging.StreamHandler):
    """Writes lines above progress bars, where there are some, and not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def _log_to_terminal() -> None:
    """This project's own messages, from rank 0."""
    logger = logging.getLogger("ctpd_nemo")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    handler = _AboveBars(sys.stderr) if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
