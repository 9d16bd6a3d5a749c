"""Other kernels of the same libraries, where there is no environment variable of theirs.

With ``CTPD_TESTS_ONEDNN=off`` torch computes without oneDNN; programs that tests start as processes of their own call
``choose`` as well.
"""

import os


def choose() -> None:
    """What the environment asks for."""
    if os.environ.get("CTPD_TESTS_ONEDNN") == "off":
        import torch

        torch.backends.mkldnn.enabled = False


def pytest_configure() -> None:
    choose()
