"""Fixtures that every room shares."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = [f"tests.session.{name}" for name in ("cpu_time", "groups", "kernels", "limits", "order")]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real tokenizers and preference pairs beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared/ folder beside the checkout")
    return folder


@pytest.fixture(scope="session")
def one_quiet_thread() -> Iterator[None]:
    """As the tools have here: sums in another order would not be equal bit for bit; for all tests that come after."""
    import torch

    from ctpd_nemo.pipeline import quiet

    quiet.after_imports()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, which takes tests little to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a file system")
    yield disk
    # Log files of the run are open yet.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
