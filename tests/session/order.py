"""Tests in another order: ``CTPD_TESTS_ORDER=SEED`` shuffles the files, and the tests of each file."""

import os
import random

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seed = os.environ.get("CTPD_TESTS_ORDER")
    if seed is None:
        return
    rng = random.Random(seed)
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(str(item.path), []).append(item)
    order = list(files)
    rng.shuffle(order)
    for tests in files.values():
        rng.shuffle(tests)
    items[:] = [item for name in order for item in files[name]]


def pytest_report_header() -> list[str]:
    seed = os.environ.get("CTPD_TESTS_ORDER")
    return [] if seed is None else [f"files and tests in random order: CTPD_TESTS_ORDER={seed}"]
