"""Which tests run in one process of pytest-xdist, with ``--dist loadgroup``: those that share what is costly.

They are those of a file, or of a folder whose ``conftest.py`` builds what takes seconds once a process.
"""

import pytest

FOLDERS = (
    "tests/data",
    "tests/distributed",
    "tests/hostile",
    "tests/pipeline/checkpointing",
    "tests/pipeline/stages",
    "tests/reproduce",
    "tests/spans",
)


def group_of(test: str) -> str:
    """The folder or file that a test, by its id, runs together with."""
    file = test.partition("::")[0]
    return next((folder for folder in FOLDERS if file.startswith(f"{folder}/")), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item.nodeid)))
