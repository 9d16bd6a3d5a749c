"""Rotary positions of a model, by ``transformers``' own initialisers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from ctpd_nemo.errors import InputError, shown

# Types whose frequencies are the same for all sequences up to some length: that of training, or the model's own.
_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_KNOWN_KEYS = frozenset(RopeParameters.__annotations__) - {"mrope_section"} | {"type"}


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: Base of the frequencies.
        inv_freq: The ``head_dim / 2`` frequencies in radians a token, any scaling applied; fp32 values.
        attention_factor: What queries and keys are both multiplied by: scores grow by its square.
        positions: The longest sequence that has these frequencies, in tokens.
    """

    theta: float
    inv_freq: tuple[float, ...]
    attention_factor: float
    positions: int


def read_rope(config: Any, head_dim: int, place: str) -> Rope:
    """The rotary positions of a config of ``transformers``.

    Raises:
        InputError: Parameters that are not complete, of a type or with a key that is not known.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    _check_parameters(parameters, place)
    kind, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise InputError(place, f"rope_theta = {shown(theta)}", "a positive number")
    if kind not in _TYPES:
        raise InputError(place, f"rotary type {shown(kind)}", f"one of {', '.join(_TYPES)}")
    positions = config.max_position_embeddings
    if kind == "default":
        # In transformers 5 this one lives in each model class, not among the initialisers.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inv_freq, factor = 1.0 / (theta**exponents), 1.0
    else:
        try:
            inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config)
        except Exception as error:  # arithmetic over whatever stands there
            raise InputError(place, f"{kind} rotary parameters that fail ({error!r})", "complete numbers") from error
    if kind == "longrope":
        # Longer sequences have other frequencies, all of their tokens.
        original = config.rope_parameters["original_max_position_embeddings"]
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise InputError(place, f"original_max_position_embeddings = {shown(original)}", "a positive whole number")
        positions = min(positions, original)
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        raise InputError(place, f"an attention factor of {factor!r}", "a finite number")
    if not torch.isfinite(inv_freq).all():
        raise InputError(place, f"{kind} rotary parameters that give {inv_freq.tolist()}", "finite frequencies")
    if 2 * len(inv_freq) != head_dim:
        raise InputError(place, f"{len(inv_freq)} rotary frequencies", f"half of head_dim = {head_dim}")
    return Rope(float(theta), tuple(inv_freq.tolist()), float(factor), positions)


def _check_parameters(parameters: Any, place: str) -> None:
    if not isinstance(parameters, dict):
        raise InputError(place, f"rotary parameters {shown(parameters)}", "a mapping")
    for key, value in parameters.items():
        if isinstance(value, dict):
            raise InputError(place, f"rotary parameters for {key} of their own", "one set for all layers")
        if key not in _KNOWN_KEYS:
            raise InputError(
                place, f"a rotary parameter {key} = {shown(value)}", "one of " + ", ".join(sorted(_KNOWN_KEYS))
            )
    share = parameters.get("partial_rotary_factor")
    if share is not None and share != 1:
        raise InputError(place, f"partial_rotary_factor = {shown(share)}", "1: all of a head is rotated")
