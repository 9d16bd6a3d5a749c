"""What sets one model family apart from the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


def full_attention(config: Any, place: str) -> None:
    """The attention of a family that has no sliding window."""


@dataclass(frozen=True)
class Family:
    """A family of dense decoders: RMSNorm, rotary positions, grouped-query attention, gated SiLU feed-forward.

    Attributes:
        model_type: The ``model_type`` of its ``config.json``.
        config_class: The ``transformers`` class that fills in what ``config.json`` leaves out.
        qkv_bias: The query, key and value projections have biases.
        qk_norm: Queries and keys are normalised head by head.
        refused_flags: Flags of ``config.json`` that add biases Megatron-Core's ``GPTModel`` has no single place for;
            a folder that sets one is refused.
        sliding_window: ``(config, place) -> window``: how many tokens each token sees, itself included, in every
            layer, or None for all before it. Raises :class:`~ctpd_nemo.errors.InputError` where layers differ.
    """

    model_type: str
    config_class: type[PretrainedConfig]
    qkv_bias: bool = False
    qk_norm: bool = False
    refused_flags: tuple[str, ...] = ()
    sliding_window: Callable[[Any, str], int | None] = full_attention
