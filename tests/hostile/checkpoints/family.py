"""Hostile checkpoints: each a change of a whole one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REFUSED, DONE = "refused", "done"


@dataclass(frozen=True)
class Attack:
    """A change of a checkpoint, and what is to come of it.

    Attributes:
        name: What is wrong.
        edit: Makes it: given the folder, and the path of a directory whose appearance is the attack's success.
        fires: Whether readers of before, which load what they find, are overcome by it.
        resumed: What becomes of a run that goes on from it: one line, or a run that is as it would have been.
        exported: What becomes of an export of it, likewise.
        fits: Whether it has a manifest that fits; else ``edit`` is the last to touch it.
    """

    name: str
    edit: Callable[[Path, Path], object]
    fires: bool = False
    resumed: str = REFUSED
    exported: str = REFUSED
    fits: bool = True
