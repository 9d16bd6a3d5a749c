"""How the tools begin and end: Hydra in front; one line and status 2 behind, where the input is at fault."""

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.stopping import Stopped, stop_at_once

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
            run(task, config)

        @functools.wraps(task)
        def main() -> None:
            stop_at_once(0 if config_name in _GO_ON else 128 + signal.SIGTERM)
            quiet.before_imports()
            _log_to_terminal()
            from nemo.core.config import hydra_runner

            conf = Path(task.__code__.co_filename).resolve().parents[1] / "conf"
            # Hydra is to raise what is wrong with a command line, not to end the process with its own words.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            try:
                hydra_runner(config_path=str(conf), config_name=config_name)(guarded)()
            except Exception as error:
                if composed:
                    raise
                stop(InputError("command line", str(error), "key=value, for keys and choices in conf"))

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
    except OSError as error:
        if error.filename is None:
            raise
        stop(InputError(os.fsdecode(error.filename), str(error.strerror), "a path that can be used"))


def stop(error: InputError) -> None:
    """End the process over bad input; of all processes that meet some, one says what it is."""
    if _is_first_to_stop():
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _is_first_to_stop() -> bool:
    """Most errors meet every rank, but a bad row or score meets the rank whose share it is in, and no other."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return dist.distributed_c10d._get_default_store().add("stopped by bad input", 1) == 1


def _log_to_terminal() -> None:
    """This project's own messages, from rank 0."""
    logger = logging.getLogger("ctpd_nemo")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
