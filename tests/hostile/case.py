"""One broken input: how it is made, and what is to be said of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld

# Where input enters.
BORDERS = (
    "rows",
    "files",
    "tokenizer",
    "template",
    "model config",
    "weights",
    "config",
    "score cache",
    "encoded dataset",
    "checkpoint",
    "run folder",
    "evaluation",
)
Values = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What a case is made in.

    Attributes:
        world: A tiny world that is whole; nothing in it may be changed.
        folder: An empty folder of the case's own, with room for whatever is broken.
        cache: A score cache of the world, not to be changed.
        encoded: An encoded dataset of the world, not to be changed.
        checkpoint: A checkpoint of the world's student, not to be changed.
    """

    world: TinyWorld
    folder: Path
    cache: Path
    encoded: Path
    checkpoint: Path


@dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        name: What is wrong.
        border: Where it enters, one of ``BORDERS``.
        build: Writes it; the values of a job that reads it, over those of a job that is right.
        place: Part of the place that the error names.
        found: Part of what it says was found.
        expected: Part of what it says was expected.
        tool: Which tool reads it.
        skipped: The reason it is counted under where bad rows are skipped; ``None`` where nothing can be skipped.
    """

    name: str
    border: str
    build: Callable[[Scene], Values]
    place: str
    found: str
    expected: str = ""
    tool: str = "train"
    skipped: str | None = field(default=None)
