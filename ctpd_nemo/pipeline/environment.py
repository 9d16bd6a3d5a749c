"""What a job runs on: package versions, the commit of this project, the machine."""

import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What numbers may depend on.
_PACKAGES = (
    "ctpd-nemo",
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "lightning",
    "transformer-engine",
    "apex",
    "flash-attn",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
    "hydra-core",
    "omegaconf",
)
_ROOT = Path(__file__).resolve().parents[2]
_DRIVER = Path("/sys/module/nvidia/version")


def environment() -> dict[str, Any]:
    """What this process runs on, as JSON.

    Returns:
        ``packages`` (versions by name, Python's and those of CUDA, NCCL and the driver among them), ``commit`` (of the
        checkout that this code is in; ``None`` where it is none), ``dirty`` (whether files differ from it),
        ``processes``, ``threads``, ``device`` and ``host``.
    """
    gpu = torch.cuda.is_available()
    commit = _git("rev-parse", "HEAD") if _is_checkout() else None
    return {
        "packages": _versions(),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "host": socket.gethostname(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two starts that numbers may depend on: its name, what it was and what it is.

    Args:
        before: A start, see ``origin.Start``, as JSON.
        now: Another.
    """
    for group in ("packages", "fingerprints"):
        there, here = before.get(group) or {}, now.get(group) or {}
        for name in dict.fromkeys([*there, *here]):
            if there.get(name) != here.get(name):
                yield name, there.get(name), here.get(name)
    for name in ("commit", "dirty", "processes", "threads", "device"):
        if before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # What torch was built for, and what it found, where there is a GPU to run on.
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        if _DRIVER.is_file():
            found["driver"] = _DRIVER.read_text(encoding="utf-8").strip()
    return found


def _is_checkout() -> bool:
    """Whether this code is a git checkout by itself, and not a package inside somebody else's."""
    top = _git("rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == _ROOT


def _git(*arguments: str) -> str | None:
    """What git prints; ``None`` where there is no git, or no repository that it trusts."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
