"""Stand-ins for the commands of a cluster."""

from pathlib import Path

import pytest

from tests.docker.stubs import Stubs


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)
