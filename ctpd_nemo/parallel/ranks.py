"""Which process of a job this is, by what ``torchrun`` tells it; nothing else is asked, and nothing guessed.

Lightning would look for clusters itself: it imports ``mpi4py`` where it is installed, whose import fails without an MPI
library, and takes the variables of a Slurm or LSF allocation for those of a job that Slurm or LSF has started.
"""

import os
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment

from ctpd_nemo.errors import InputError

_TORCHRUN = "what torchrun gives each process"
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Numbers of this process and of its job.

    Attributes:
        rank: Of this process in the job.
        world_size: Processes of the job.
        local_rank: Of this process on its node.
        local_world_size: Processes of its node.
        node_rank: Of the node.
        launched: Whether the processes find each other by ``MASTER_ADDR``; else there is just this one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launched: bool = False


def world_size() -> int:
    """Processes of the job: what ``torchrun`` says, 1 without it.

    Raises:
        InputError: It is no number.
    """
    return _number("WORLD_SIZE", 1, least=1)


def read_ranks() -> Ranks:
    """What the environment says of this process.

    Without ``WORLD_SIZE`` it is a job by itself, whatever else is set.

    Raises:
        InputError: Variables are missing, are no numbers, or do not go together.
    """
    world = world_size()
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if world == 1 and missing:
        for name in ("RANK", "LOCAL_RANK"):
            if _number(name, 0):
                raise InputError(name, f"{os.environ[name]}, of a job of one process", f"{_TORCHRUN}, or nothing")
        return Ranks()
    if missing:
        raise InputError(missing[0], f"nothing, in a job of WORLD_SIZE={world}", _TORCHRUN)
    ranks = Ranks(
        rank=_number("RANK", 0),
        world_size=world,
        local_rank=_number("LOCAL_RANK", 0),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1, least=1),
        node_rank=_number("GROUP_RANK", 0),
        launched=True,
    )
    if ranks.local_rank and not os.environ.get("LOCAL_WORLD_SIZE"):
        raise InputError("LOCAL_WORLD_SIZE", f"nothing, with LOCAL_RANK={ranks.local_rank}", _TORCHRUN)
    for name, value, size in (
        ("RANK", ranks.rank, ranks.world_size),
        ("LOCAL_RANK", ranks.local_rank, ranks.local_world_size),
    ):
        if value >= size:
            raise InputError(name, f"{value}, of {size} processes", f"0 to {size - 1}, {_TORCHRUN}")
    if ranks.local_world_size > world:
        raise InputError("LOCAL_WORLD_SIZE", f"{ranks.local_world_size} in a job of {world}", _TORCHRUN)
    return ranks


def check_device(ranks: Ranks) -> None:
    """Stop where there is no GPU for this process, on a machine with GPUs.

    Raises:
        InputError: Its node has fewer.
    """
    if torch.cuda.is_available() and ranks.local_rank >= (gpus := torch.cuda.device_count()):
        found = f"{ranks.local_rank}, where {gpus} GPU{'s are' if gpus > 1 else ' is'} visible"
        raise InputError("LOCAL_RANK", found, f"a GPU for each process: torchrun --nproc-per-node {gpus}")


def name_rank() -> None:
    """Say to libraries that ask the environment by themselves which rank this is, where it is the only one.

    NeMo would take ``SLURM_PROCID`` and ``OMPI_COMM_WORLD_RANK`` of an allocation for it.
    """
    if not read_ranks().launched:
        os.environ["RANK"] = "0"


class JobEnvironment(ClusterEnvironment):
    """The same for Lightning, which is given it and does not look for a cluster. Process groups are ``layout``'s."""

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 is."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Where it listens."""
        return _number("MASTER_PORT", 0)

    @staticmethod
    def detect() -> bool:
        """True: it is given."""
        return True

    def world_size(self) -> int:
        """Processes of the job."""
        return read_ranks().world_size

    def set_world_size(self, size: int) -> None:
        """Nothing: the launcher says it."""

    def global_rank(self) -> int:
        """Of this process in the job."""
        return read_ranks().rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the launcher says it."""

    def local_rank(self) -> int:
        """Of this process on its node."""
        return read_ranks().local_rank

    def node_rank(self) -> int:
        """Of its node."""
        return read_ranks().node_rank


def _number(name: str, default: int, least: int = 0) -> int:
    said = os.environ.get(name)
    if said is None:
        return default
    if not (said.isascii() and said.isdigit()) or int(said) < least:
        raise InputError(name, repr(said), f"{least} or more, {_TORCHRUN}")
    return int(said)
