"""A pipeline before its first stage begins: every stage as it would be now, with what there is of the others."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import batching_of
from ctpd_nemo.models.gpt import check_sizes
from ctpd_nemo.pipeline.preflight import (
    check_cache,
    check_job,
    check_models,
    check_room,
    checkpoint_bytes,
    is_two_sided,
    model_folders,
    open_data,
)
from ctpd_nemo.pipeline.recipe import Stage, stage_values
from ctpd_nemo.pipeline.stage_status import read_status


@dataclass(frozen=True)
class StandingStage:
    """A stage with folders that are there now.

    Attributes:
        stage: Which.
        run: Its config, each model that an earlier stage is to train being the one that this one begins with: it has
            the same sizes and the same tokenizer.
        makes_scores: Whether the score cache that it reads is that of a stage.
    """

    stage: Stage
    run: RunConfig
    makes_scores: bool

    def check(self) -> None:
        """Look at what can be seen without reading data; process groups need not be there.

        Raises:
            InputError: A value or folder cannot be used.
        """
        check_job(self.run)
        read_status(Path(self.run.run_dir))
        with self._named():
            online = getattr(self.run.method, "reference", None) == "online"
            batching_of(self.run, online=online and "model.teacher.path" in self.stage.inputs)
            for folder in dict.fromkeys(model_folders(self.run).values()):
                check_sizes(read_architecture(folder), self.run.parallel, self.run.precision)
            if not self.makes_scores:
                check_cache(self.run)

    def has_begun(self) -> bool:
        """Whether there are checkpoints of it, or what it leaves."""
        return any((Path(self.run.run_dir) / name).exists() for name in ("checkpoints", self.stage.output))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Have an error name the stage."""
        try:
            yield
        except InputError as error:
            raise InputError(f"stage {self.stage.name}, {error.place}", error.found, error.expected) from error

    def check_models(self, sides: Mapping[str, Side]) -> None:
        """Look at its models, as each reads.

        Args:
            sides: Tokenizers and templates, by ``repr`` of their config.

        Raises:
            InputError: One cannot be used.
        """
        with self._named():
            model = self.run.model
            # Of a method without a teacher, what is frozen reads as the policy does.
            reference = model.teacher if is_two_sided(self.run) else self.run.policy_side()
            check_models(self.run, sides[repr(self.run.policy_side())], sides[repr(reference)])


def put_folders_of_now(config: DictConfig, stages: Mapping[str, Stage], stage: Stage, run: RunConfig) -> StandingStage:
    """Put folders that are there now into the config of a stage.

    Args:
        config: As of ``run_pipeline``.
        stages: All stages of the run, by name.
        stage: Which.
        run: Its config; it is changed.

    Raises:
        InputError: A stage that is not asked for has left nothing that this one could build on.
    """
    inputs = stage.builds_on(config)
    for key, name in inputs.items():
        source = stages[name]
        if not is_asked_for(config, source):
            _check_done(config, stage, source)
        elif not source.scores:
            # Each is two or three names: model.teacher.path, method.positive.
            *parents, last = key.split(".")
            part: Any = run
            for parent in parents:
                part = getattr(part, parent)
            setattr(part, last, _begins_with(config, stages, source))
    return StandingStage(stage, run, any(key.endswith("scores") for key in inputs))


def check_reading(standing: Sequence[StandingStage]) -> Iterator[None]:
    """Open all data, tokenizers and templates once, and look at models and at the disk, in parts; one process does it.

    Raises:
        InputError: A file, row or folder cannot be used, or there is no room.
    """
    if len(standing) > 1:
        sides: dict[str, Side] = {}
        for run in _distinct([one.run for one in standing]):
            data = open_data(run)
            sides[repr(run.policy_side())] = data.policy
            if data.reference is not None:
                sides[repr(run.model.teacher)] = data.reference
            yield
        for one in standing:
            one.check_models(sides)
            yield
    # A stage that has begun has had its room.
    new = [one for one in standing if not one.stage.scores and not one.has_begun()]
    if new:
        needed = sum(checkpoint_bytes(model_folders(one.run)["policy"]) for one in new)
        check_room(Path(new[0].run.run_dir).parent, needed)


def is_asked_for(config: DictConfig, stage: Stage) -> bool:
    """Whether a stage is to be run, or found complete."""
    return config.only is None or stage.name in config.only


def output_of(config: DictConfig, stage: Stage) -> Path:
    """Where a stage leaves what others build on."""
    return Path(config.run_dir) / stage.name / stage.output


def _check_done(config: DictConfig, stage: Stage, source: Stage) -> None:
    status = read_status(Path(config.run_dir) / source.name)
    if status is None or not status.complete or not output_of(config, source).exists():
        found = f"nothing complete in {config.run_dir}/{source.name}"
        raise InputError(f"stages.{source.name}", found, f"a stage that is done: {stage.name} builds on it")


def _begins_with(config: DictConfig, stages: Mapping[str, Stage], source: Stage) -> str | None:
    """The folder of the model that a stage trains, before any stage has trained it."""
    earlier = source.builds_on(config).get(f"model.{source.policy}.path")
    if earlier is not None:
        return _begins_with(config, stages, stages[earlier])
    own: Any = OmegaConf.merge(config.model, stage_values(config, source).get("model") or {})
    return own[source.policy].path


def _distinct(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Runs that open all there is to open: those that read both sides read what others of the same data do of one."""
    found: dict[tuple[str, ...], RunConfig] = {}
    for run in sorted(runs, key=is_two_sided, reverse=True):
        read = [repr(run.policy_side())] + ([repr(run.model.teacher)] if is_two_sided(run) else [])
        data = repr(run.data)
        if not any(key[0] == data and set(read) <= set(key[1:]) for key in found):
            found[(data, *read)] = run
    return list(found.values())
