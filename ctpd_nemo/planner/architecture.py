"""The architecture of a model: from its folder, or by name from ``conf/architecture`` where the folder is not there."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ctpd_nemo.convert.architecture import Architecture, parse_architecture, read_architecture
from ctpd_nemo.errors import InputError
from ctpd_nemo.planner.parameters import total_parameters

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "architecture"
# Tunings of a model that share its sizes.
_TUNINGS = ("-instruct", "-base", "-chat")


@dataclass(frozen=True)
class NamedArchitecture:
    """An architecture and where it is from.

    Attributes:
        name: The last part of the model's path.
        architecture: Its sizes.
        source: The file that they were read from.
    """

    name: str
    architecture: Architecture
    source: str

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return total_parameters(self.architecture)


def find_architecture(path: str | None, key: str) -> NamedArchitecture:
    """The architecture of a model folder; where there is no such folder, the known one of that name.

    Args:
        path: A Hugging Face folder, or a path that ends like one: ``models/Qwen2.5-72B``.
        key: The config key to name in an error, e.g. ``model.teacher``.

    Raises:
        InputError: Neither a folder nor a known name.
    """
    if path is None:
        raise InputError(f"{key}.path", "nothing", "a Hugging Face folder, or the name of a known model")
    name = Path(path).name
    if Path(path).is_dir():
        return NamedArchitecture(name, read_architecture(path), str(Path(path) / "config.json"))
    known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    short = name.lower()
    for tuning in _TUNINGS:
        short = short.removesuffix(tuning)
    if short not in known:
        raise InputError(f"{key}.path", f"{path}, no such folder", "a model folder, or one of " + ", ".join(known))
    values = OmegaConf.to_container(OmegaConf.load(known[short]))
    assert isinstance(values, dict)
    place = f"conf/architecture/{known[short].name}"
    return NamedArchitecture(name, parse_architecture({str(k): v for k, v in values.items()}, place), place)
