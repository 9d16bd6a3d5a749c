"""One case, from its command to its result; a case that cannot run says why."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases.setting import Case, Setting


def run_case(setting: Setting, case: Case) -> dict[str, Any]:
    """The result of a case, or ``failed`` with the reason: no such recipe on this device, no room in its memory."""
    from gpu_cases.score import score_case
    from gpu_cases.train import train_case

    run = {"train": train_case, "score": score_case}[case.part]
    with tempfile.TemporaryDirectory() as folder:
        return _or_reason(run, setting, case, Path(folder))


def run_head(sizes: dict[str, int]) -> dict[str, Any]:
    """The log-prob head at one width, or ``failed`` likewise."""
    from gpu_cases.head import HeadCase, head_case

    return _or_reason(head_case, HeadCase(**sizes))


def _or_reason(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return function(*arguments)
    except Exception as error:  # whatever it is, the other cases go on, and the report names it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"}
