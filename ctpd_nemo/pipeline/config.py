"""From Hydra's config to the typed one, with errors that name the key."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.methods import METHOD_CONFIGS

T = TypeVar("T")


def typed(config_class: type[T], values: DictConfig | Mapping[str, Any], place: str = "") -> T:
    """An instance of a config dataclass from Hydra's values.

    Args:
        config_class: A dataclass of plain types and other such dataclasses.
        values: What the user said.
        place: The key that ``values`` stand under, to name keys in full.

    Raises:
        InputError: An unknown key (with the nearest known one), or a value of another type.
    """
    config = OmegaConf.structured(config_class)
    _fill(config, _plain(values), place)
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def _fill(section: DictConfig, values: Mapping[str, Any], place: str) -> None:
    """Set the keys of a typed section one by one, so that an error can say which it was."""
    types = {field.name: field.type for field in fields(OmegaConf.get_type(section))}  # type: ignore[arg-type]
    for name, value in values.items():
        key = f"{place}.{name}" if place else str(name)
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1)
            expected = f"{near[0]!r}?" if near else "one of " + ", ".join(types)
            raise InputError(key, "a key that is not known", expected)
        if is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise InputError(key, repr(value), "keys and their values")
            _fill(section[name], value, key)
            continue
        if types[name] in (list[str], list[str] | None) and isinstance(value, str) and value:
            # One where several may be.
            value = [value]
        try:
            section[name] = value
        except OmegaConfBaseException as error:
            expected_type = types[name]
            expected = expected_type.__name__ if isinstance(expected_type, type) else str(expected_type)
            raise InputError(key, repr(value), f"a value of type {expected}") from error


def _plain(config: Any) -> Any:
    """The same as dictionaries and lists, with every ``${...}`` filled in."""
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        message = str(error.msg or error).splitlines()[0]
        raise InputError(str(error.full_key), message, "a value") from error


def check_literal(values: Any, place: str, key: str = "") -> None:
    """Stop where values that were read from a folder ask to be filled in, as by a variable of the environment.

    Args:
        values: Mappings, lists and what they hold.
        place: Where they were read.
        key: What they stand under.

    Raises:
        InputError: It names the key of a text, or the name of a key, that holds ``${``.
    """
    if isinstance(values, str):
        if "${" in values:
            raise InputError(
                f"{place}, {key}", repr(values), "a value without ${...}: nothing of a folder is filled in"
            )
    elif isinstance(values, Mapping):
        for name, value in values.items():
            inner = f"{key}.{name}".removeprefix(".")
            check_literal(name, place, inner)
            check_literal(value, place, inner)
    elif isinstance(values, list | tuple):
        for value in values:
            check_literal(value, place, key)


def run_config(config: DictConfig) -> RunConfig:
    """The config of a training or scoring job.

    Raises:
        InputError: A key or value cannot be used, or the method is not known.
    """
    values = _plain(config)
    method = typed_method(values.pop("method", None))
    run = typed(RunConfig, {**values, "method": None})
    run.method = method
    return run


def typed_method(values: Any) -> Any:
    """The config of a method, as the dataclass of that method.

    Raises:
        InputError: No such method, or a key or value it does not know.
    """
    name = values.get("name") if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in METHOD_CONFIGS:
        raise InputError("method.name", repr(name), "one of " + ", ".join(METHOD_CONFIGS))
    method = typed(METHOD_CONFIGS[name], values, place="method")
    if hasattr(method, "check"):
        method.check()
    return method
