"""Jobs that are killed, what they leave, and how that is compared with a job that never was."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ctpd_nemo.parallel.checkpoint_files import find_damage, named_checkpoints
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults.conftest import Zygote
from tests.forks.client import TOOLS
from tests.pipeline.recipe import SMALL_BATCHES, small_job

STEPS, EVERY, VALIDATE_EVERY = 6, 2, 3
# Seconds, for what would take for ever: a machine that does much else takes ten times as long as one that is idle.
BOUND = 900.0


@dataclass(frozen=True)
class Job:
    """One tool with its arguments, in a folder of its own."""

    zygote: Zygote
    folder: Path
    tool: str
    arguments: list[str]
    ranks: int

    def run(
        self, fault: dict[str, Any] | None = None, spoil: dict[str, Any] | None = None, grace: float = BOUND
    ) -> tuple[list[int], float]:
        """Run it, to its end where there is no fault and nothing is spoilt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        statuses, seconds = self.zygote.run(
            program=str(TOOLS / self.tool),
            arguments=self.arguments,
            ranks=self.ranks,
            folder=str(self.folder),
            fault=fault,
            spoil=spoil,
            bound=BOUND,
            grace=grace,
        )
        assert fault is not None or spoil is not None or not any(statuses), f"{statuses}\n{self.logs()}"
        return statuses, seconds

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("rank-*.log")))


def training(zygote: Zygote, world: TinyWorld, folder: Path, ranks: int, async_save: bool) -> Job:
    """Six steps, checkpoints of every second, validations after every third; two ranks are stages of a pipeline."""
    arguments = small_job(
        world,
        folder / "run",
        "dpo",
        f"data.validation=[{world.test}]",
        f"trainer.max_steps={STEPS}",
        "trainer.epochs=2",
        f"trainer.checkpoint_every={EVERY}",
        f"trainer.validate_every={VALIDATE_EVERY}",
        "trainer.keep_last=2",
        f"trainer.async_save={async_save}",
        f"parallel.pipeline={ranks}",
        "optim.lr=1e-3",
    )
    return Job(zygote, folder, "train.py", arguments, ranks)


def scoring(zygote: Zygote, world: TinyWorld, folder: Path, ranks: int) -> Job:
    """24 pairs in shards of four, under two models."""
    arguments = [
        f"model.student.path={world.student}",
        f"model.teacher.path={world.teacher}",
        f"data.train=[{world.train}]",
        f"run_dir={folder / 'run'}",
        f"method.cache={folder / 'cache'}",
        "method.pairs_per_shard=4",
        f"method.reference={world.teacher}",
        f"method.positive={world.teacher}",
        *SMALL_BATCHES,
    ]
    return Job(zygote, folder, "score.py", arguments, ranks)


def one_stage(zygote: Zygote, world: TinyWorld, folder: Path, ranks: int) -> Job:
    """The pipeline with one stage: three steps and an export."""
    arguments = [
        f"model.teacher.path={world.teacher}",
        f"model.student.path={world.student}",
        f"data.train=[{world.train}]",
        f"run_dir={folder / 'run'}",
        *SMALL_BATCHES,
        "only=[sft_student]",
        "optim.lr=1e-3",
        "trainer.checkpoint_every=1",
    ]
    return Job(zygote, folder, "pipeline.py", arguments, ranks)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metric log without times."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and name != "data_wait_share"}
        for row in found
    ]


def steps_done(run_dir: Path) -> int:
    """Steps in the log of a job that was killed, whole rows or not."""
    log = run_dir / "metrics.jsonl"
    steps = [0]
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return max(steps)


def whole_checkpoints(run_dir: Path) -> list[int]:
    """Steps of the checkpoints; whatever has the name of one must be whole, every byte."""
    named = named_checkpoints(run_dir / "checkpoints")
    for folder in named:
        damage = find_damage(folder)
        assert damage is None, damage
    return [int(folder.name.removeprefix("step-")) for folder in named]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, read by torch alone."""
    stored = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    return state
