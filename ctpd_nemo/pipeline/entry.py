"""How the tools end: quietly, or with one line and status 2 where the input is at fault."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from omegaconf import DictConfig

from ctpd_nemo.errors import InputError

T = TypeVar("T")


def entry_point(task: Callable[[DictConfig], T]) -> Callable[[DictConfig], T]:
    """A task whose ``InputError`` becomes one line on standard error, written by rank 0, and exit status 2."""

    @functools.wraps(task)
    def run(config: DictConfig) -> T:
        try:
            return task(config)
        except InputError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run
