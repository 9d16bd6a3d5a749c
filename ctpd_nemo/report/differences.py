"""What a job ran with beside what its experiment file says."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.config import check_literal, run_config
from ctpd_nemo.pipeline.origin import CONFIG, FILE, Origin, read_origin
from ctpd_nemo.pipeline.recipe import find_stages
from ctpd_nemo.pipeline.stages import StageResult, stage_config
from ctpd_nemo.report.run_folder import Job

CONF = Path(__file__).resolve().parents[2] / "conf"


def differences(job: Job) -> tuple[str, list[tuple[str, str, str]] | None]:
    """What a job's config is compared with, and for each key that differs both values.

    Where it cannot be compared there is ``None`` instead, and the text says why.

    Raises:
        InputError: What the job was started with cannot be read.
    """
    origin = read_origin(job.folder)
    if origin is None or not job.config:
        return "not known: the job was not started by one of the tools, or wrote no config", None
    name = f"conf/experiment/{origin.experiment}.yaml" if origin.experiment else f"conf/{origin.config}.yaml"
    try:
        # Hydra would fill in what a folder that someone else wrote asks for, and the page would show it.
        check_literal(job.config, str(job.folder / CONFIG))
        check_literal([origin.config, origin.experiment, origin.method], str(job.folder / FILE))
        expected = _expected(job, origin)
    except InputError as error:
        return f"{name} as it is now makes no such job ({error})", None
    return name, _differing(flat(expected), flat(job.config))


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Values by their full keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{place}.{name}" if place else str(name)
        found |= flat(value, key) if isinstance(value, Mapping) else {key: value}
    return found


def _expected(job: Job, origin: Origin) -> dict[str, Any]:
    """The config of the same job with nothing changed on the command line."""
    experiment = [f"experiment={origin.experiment}"] if origin.experiment else []
    if origin.method is not None:
        config = _composed(origin.config, [f"method={origin.method}", *experiment])
        return asdict(run_config(config))
    config = _composed(origin.config, experiment)
    # The world of the quickstart is no value of a job.
    config.pop("world", None)
    # Folders are the run's own: where it lies is no difference.
    config.run_dir = str(Path(str(job.config.get("run_dir", job.folder))).parent)
    stages = find_stages(config)
    stage = next((stage for stage in stages if stage.name == job.name), None)
    if stage is None:
        raise InputError(f"stages.{job.name}", "no such stage", "a stage of the recipe")
    sources = stage.builds_on(config).values()
    outputs = {
        source.name: StageResult(Path(config.run_dir) / source.name / source.output, 0.0, skipped=True)
        for source in stages
        if source.name in sources
    }
    return asdict(stage_config(config, stage, outputs))


def _composed(name: str, overrides: list[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    if not (CONF / f"{name}.yaml").is_file():
        raise InputError(str(CONF), f"no {name}.yaml", "the config files of a checkout")
    try:
        # Inside a tool Hydra is at work already, over this very folder.
        at_work = GlobalHydra.instance().is_initialized()
        with nullcontext() if at_work else initialize_config_dir(str(CONF), version_base=None):
            config = compose(name, overrides=overrides)
        # Hydra's own can take no keys away.
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type,return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(CONF), str(error), "config files that can be put together") from error


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, expected and found value, of those that are not the same."""
    absent = object()
    rows: list[tuple[str, str, str]] = []
    for key in dict.fromkeys([*expected, *found]):
        before, after = expected.get(key, absent), found.get(key, absent)
        if before != after:
            there, here = ("\u2013" if value is absent else shown(value) for value in (before, after))
            rows.append((key, there, here))
    return rows


def shown(value: Any) -> str:
    """A value of a config in one line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
