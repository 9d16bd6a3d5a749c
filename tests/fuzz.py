"""How many inputs fuzz tests draw: a few, always the same, or as many as ``CTPD_FUZZ_EXAMPLES`` says, drawn anew."""

import os

from hypothesis import HealthCheck, settings

_ASKED = int(os.environ.get("CTPD_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int) -> settings:
    """Settings of a fuzz test that draws ``examples`` inputs in a normal run."""
    return settings(
        max_examples=_ASKED or examples,
        derandomize=not _ASKED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
