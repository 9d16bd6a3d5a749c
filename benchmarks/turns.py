"""Training loops side by side: each in a process of its own, one step at a time, in turns.

A side is a function of a module that trains as its users would, and calls ``turn`` where a step ends. There it waits
until all other sides have had their step. So a slow minute of the machine falls on all sides alike, and yet no side
shares memory, threads or global state with another. A step is all that lies between two calls: the loop around the
model, the data and the logs included.
"""

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from measure import PeakMemory

# Called once when everything is set up, then at the end of every step, with what is to be known about it.
Turn = Callable[..., None]


@dataclass
class SideRun:
    """What one side did.

    Attributes:
        seconds: Of each step, by the clock on the wall.
        cpu_seconds: Of each step, of all threads of the process: what is left of noise where others use the machine.
        steps: What the side said about each.
        process_bytes: The resident set of its process at the most, from the first step on.
        idle_bytes: The same before the first step: imports, weights and whatever it keeps.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    process_bytes: int = 0
    idle_bytes: int = 0


def take_turns(sides: Mapping[str, str], arguments: Sequence[Any], steps: int) -> dict[str, SideRun]:
    """Run the sides, ``steps`` steps each.

    Args:
        sides: The function of each as ``module:function``, by name; only the side's own process imports it. It gets
            ``turn`` and the arguments, and must call ``turn`` ``1 + steps`` times; what comes after is not measured.
        arguments: Of all sides alike.
        steps: Steps of each.

    Raises:
        RuntimeError: A side failed; with its traceback.
    """
    runs = {name: SideRun() for name in sides}
    with _processes(sides, arguments) as connections:
        for _ in range(steps):
            for name, connection in connections.items():
                connection.send("go")
                seconds, cpu_seconds, runs[name].process_bytes, facts = _receive(name, connection)
                runs[name].seconds.append(seconds)
                runs[name].cpu_seconds.append(cpu_seconds)
                runs[name].steps.append(facts)
        for name, connection in connections.items():
            connection.send("go")
            runs[name].idle_bytes = _receive(name, connection)
    return runs


@contextmanager
def _processes(sides: Mapping[str, str], arguments: Sequence[Any]) -> Iterator[dict[str, Connection]]:
    """The sides, set up one after the other; those that still run at the end were stopped by an error."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for name, function in sides.items():
            connections[name], there = context.Pipe()
            process = context.Process(target=_run_side, args=(there, function, arguments))
            process.start()
            there.close()
            processes.append(process)
            _receive(name, connections[name])
        yield connections
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def _receive(name: str, connection: Connection) -> Any:
    try:
        kind, value = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} has ended") from None
    if kind == "error":
        raise RuntimeError(f"{name} failed:\n{value}")
    return value


def _run_side(connection: Connection, function: str, arguments: Sequence[Any]) -> None:
    """In the side's process: run it, time what lies between its turns, and say what memory it took."""
    memory = PeakMemory()
    started: tuple[float, float] | None = None

    def turn(**facts: Any) -> None:
        nonlocal started
        if started is None:
            memory.start()
            connection.send(("ready", None))
        else:
            seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            memory.stop()
            connection.send(("step", (seconds, cpu_seconds, memory.peak, facts)))
        connection.recv()
        started = time.perf_counter(), time.process_time()

    try:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(turn, *arguments)
        connection.send(("end", memory.before))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise
