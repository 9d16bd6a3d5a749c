"""What is to be reproduced, typed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.evaluate import EvaluateConfig, PairsConfig
from ctpd_nemo.pipeline.config import typed
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld, build_tiny_world
from ctpd_nemo.pipeline.tiny_world.models import ModelSize
from ctpd_nemo.pipeline.tiny_world.tasks import KINDS
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.workload import Workload

_TABLES = Path(__file__).parent / "tables_of_paper"


@dataclass
class TableConfig:
    """A table of the paper, a file in ``tables_of_paper``.

    Attributes:
        number: The paper's.
        title: Of ours.
        against: The row that differences are taken from.
        rows: Names of rows, and the stage whose student each is about.
        paper: What the paper reports, by experiment and row: scores of the six benchmarks in %, each with its standard
            error behind it where the paper prints them, and the average.
    """

    number: int = 1
    title: str = ""
    against: str = ""
    rows: dict[str, str] = field(default_factory=dict)
    paper: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass
class WorldConfig:
    """A tiny world, see :func:`ctpd_nemo.pipeline.tiny_world.build.build_tiny_world`; sizes as in ``ModelSize``."""

    n_train: int = 4000
    n_test: int = 1000
    mixed: float = 0.0
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    teacher: dict[str, int] = field(default_factory=dict)
    student: dict[str, int] = field(default_factory=dict)

    def build(self, folder: Path, seed: int) -> TinyWorld:
        """The world of a seed.

        Raises:
            InputError: A value cannot be used.
        """
        sizes = {}
        for name in ("teacher", "student"):
            try:
                sizes[name] = ModelSize(**getattr(self, name))
            except TypeError as error:
                expected = ", ".join(ModelSize.__dataclass_fields__)
                raise InputError(f"world.{name}", str(getattr(self, name)), expected) from error
        return build_tiny_world(folder, **vars(self) | sizes, seed=seed)


@dataclass
class StudentEvaluation:
    """How students of a tiny world are evaluated, see :class:`ctpd_nemo.evaluation.evaluate.EvaluateConfig`."""

    batch_size: int = 128
    max_new_tokens: int = 32
    seed: int = 1234

    def check(self) -> None:
        """Stop with an ``InputError`` that names the key of a value that no evaluation takes."""
        pairs = PairsConfig(max_new_tokens=self.max_new_tokens)
        try:
            EvaluateConfig(pairs=pairs, batch_size=self.batch_size, seed=self.seed).check()
        except InputError as error:
            name = error.place.rpartition(".")[2]
            raise InputError(f"evaluation.{name}", error.found, error.expected) from error


@dataclass
class ReproduceConfig:
    """What ``conf/reproduce.yaml`` adds to the pipeline's config.

    Attributes:
        table: Which table, one of ``tables_of_paper``.
        rows: Names of those of its rows that are asked for; ``None`` for all.
        seeds: Each has a folder of its own; ``None``: 0 to 3 in a tiny world, 0 with models of one's own.
        processes: Seeds at a time, in a tiny world.
        world: The tiny world.
        evaluation: Of its students.
        launch: With models of one's own: "print" the jobs, or submit them to "slurm".
        gpus: Of each such job.
        hardware: The machine that their cost is estimated for.
        workload: The data.
    """

    table: int = 1
    rows: list[str] | None = None
    seeds: list[int] | None = None
    processes: int = 2
    world: WorldConfig = field(default_factory=WorldConfig)
    evaluation: StudentEvaluation = field(default_factory=StudentEvaluation)
    launch: str = "print"
    gpus: int = 8
    hardware: Hardware = field(default_factory=Hardware)
    workload: Workload = field(default_factory=Workload)

    def check(self) -> None:
        """Stop with an ``InputError`` that names the key of a value that cannot be used."""
        for name in ("processes", "gpus"):
            if getattr(self, name) < 1:
                raise InputError(name, str(getattr(self, name)), "1 or more")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise InputError("seeds", str(self.seeds), "one or more seeds, each once")
        if self.launch not in ("print", "slurm"):
            raise InputError("launch", repr(self.launch), "print or slurm")
        if self.table not in known_tables():
            raise InputError("table", str(self.table), "one of " + ", ".join(map(str, known_tables())))
        self.evaluation.check()
        self.hardware.check()
        node = self.hardware.gpus_per_node
        if self.gpus > node and self.gpus % node:
            raise InputError("gpus", str(self.gpus), f"a node's {node} or fewer, or whole nodes")
        self.workload.check()


def split_config(config: DictConfig) -> tuple[ReproduceConfig, DictConfig]:
    """Our own keys, and the pipeline's without them.

    Raises:
        InputError: A key or value of ours cannot be used.
    """
    values: Any = OmegaConf.to_container(config)
    own = {name: values.pop(name) for name in ReproduceConfig.__dataclass_fields__ if name in values}
    recipe = OmegaConf.create(values)
    assert isinstance(recipe, DictConfig)
    asked = typed(ReproduceConfig, own)
    asked.check()
    return asked, recipe


def known_tables() -> list[int]:
    """Numbers of the tables."""
    return sorted(int(path.stem) for path in _TABLES.glob("*.yaml"))


def read_table(number: int, rows: Sequence[str] | None = None) -> TableConfig:
    """One of the tables, or some of its rows.

    Raises:
        InputError: It has no row of a name.
    """
    values = OmegaConf.load(_TABLES / f"{number}.yaml")
    assert isinstance(values, DictConfig)
    table = typed(TableConfig, values)
    if rows is not None:
        for name in rows:
            if name not in table.rows:
                raise InputError("rows", repr(name), f"rows of table {number}: " + ", ".join(table.rows))
        left_out = table.rows.keys() - set(rows)
        table.rows = {name: stage for name, stage in table.rows.items() if name not in left_out}
        table.paper = {
            experiment: {name: values for name, values in reported.items() if name not in left_out}
            for experiment, reported in table.paper.items()
        }
    if not table.rows:
        raise InputError("rows", "none", "names of rows, or null for all")
    return table
