"""Pickles that call, in every place that has some, and programs that no pickler writes."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.hostile.checkpoints.family import DONE, REFUSED, Attack
from tests.hostile.checkpoints.payloads import PAYLOADS, PROTOCOLS, load_a_nested_storage, programs
from tests.hostile.checkpoints.places import PICKLES, VALUES

_Payload = Callable[[Path], Any]


def _call(place: str, payload: _Payload, protocol: int) -> Attack:
    def edit(folder: Path, canary: Path) -> None:
        VALUES[place](folder, payload(canary), protocol)

    # Megatron-Core, from 0.17 on, has put one with rules in the place of torch's own.
    tamed = payload is load_a_nested_storage and torch.storage._load_from_bytes.__module__ != "torch.storage"
    return Attack(f"{payload.__name__} {place}, protocol {protocol}", edit, fires=not tamed)


def _program(place: str, name: str, fires: bool) -> Attack:
    def edit(folder: Path, canary: Path) -> None:
        PICKLES[place](folder, programs(canary)[name][0])

    # Layers without FP8 keep an empty state: one that is read, and says nothing.
    outcome = DONE if (place, name) == ("an extra state", "nothing") else REFUSED
    return Attack(f"{name} as {place}", edit, fires, outcome, outcome)


def calls() -> Iterator[Attack]:
    """Each payload, place and protocol, and each pair of places and protocols, though not all three of all."""
    for number, (place, protocol) in enumerate(itertools.product(VALUES, PROTOCOLS)):
        # Both counts have no common divisor with that of payloads.
        yield _call(place, PAYLOADS[number % len(PAYLOADS)], protocol)


def all_calls() -> Iterator[Attack]:
    for place, payload, protocol in itertools.product(VALUES, PAYLOADS, PROTOCOLS):
        yield _call(place, payload, protocol)


def handmade() -> Iterator[Attack]:
    """Each program in one place, in turn."""
    for place, (name, (_, fires)) in zip(itertools.cycle(PICKLES), programs(Path("canary")).items(), strict=False):
        yield _program(place, name, fires)


def names_with_dots() -> Iterator[Attack]:
    """One for each reader, in the protocols that writers have."""
    for place in ("the index", "the common state", "an object", "an extra state"):
        for name in ("a name with dots", "a name with dots, protocol 2"):
            yield _program(place, name, programs(Path("canary"))[name][1])


def all_handmade() -> Iterator[Attack]:
    for place, (name, (_, fires)) in itertools.product(PICKLES, programs(Path("canary")).items()):
        yield _program(place, name, fires)
