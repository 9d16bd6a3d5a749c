"""From Hydra's config to the typed one, with errors that name the key."""

import difflib
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.methods import METHOD_CONFIGS

T = TypeVar("T")


def typed(config_class: type[T], values: DictConfig, place: str = "") -> T:
    """An instance of a config dataclass from Hydra's values.

    Args:
        config_class: A dataclass of plain types and other such dataclasses.
        values: What the user said.
        place: The key that ``values`` stand under, to name keys in full.

    Raises:
        InputError: An unknown key (with the nearest known one), a value of another type, or a missing value.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), values))  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = [field.name for field in fields(error.object_type or config_class)]  # type: ignore[arg-type]
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1)
        expected = f"{near[0]!r}?" if near else "one of " + ", ".join(known)
        raise InputError(_join(place, key), "a key that is not known", expected) from error
    except MissingMandatoryValue as error:
        raise InputError(_join(place, str(error.full_key)), "nothing", "a value") from error
    except OmegaConfBaseException as error:
        message = (error.msg or str(error)).splitlines()[0]
        raise InputError(_join(place, str(error.full_key)), message, "a value of the key's type") from error


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def run_config(config: DictConfig) -> RunConfig:
    """The config of a training or scoring job.

    Raises:
        InputError: A key or value cannot be used, or the method is not known.
    """
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    method = typed_method(values.pop("method", None))
    run = typed(RunConfig, OmegaConf.create({**values, "method": None}))
    run.method = method
    return run


def typed_method(values: Any) -> Any:
    """The config of a method, as the dataclass of that method.

    Raises:
        InputError: No such method, or a key or value it does not know.
    """
    name = values.get("name") if isinstance(values, dict) else None
    if name not in METHOD_CONFIGS:
        raise InputError("method.name", repr(name), "one of " + ", ".join(METHOD_CONFIGS))
    method = typed(METHOD_CONFIGS[name], OmegaConf.create(values), place="method")
    if hasattr(method, "check"):
        method.check()
    return method
