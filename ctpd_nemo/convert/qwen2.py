"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from typing import Any

from transformers import Qwen2Config

from ctpd_nemo.convert.family import Family
from ctpd_nemo.errors import InputError


def window_of_all_layers(config: Any, place: str) -> int | None:
    """The sliding window, where ``use_sliding_window`` and ``max_window_layers`` give all layers the same.

    ``transformers`` slides the window in the layers from ``max_window_layers`` on.
    """
    kinds = set(config.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return config.sliding_window
    raise InputError(place, f"layers of different attention ({', '.join(sorted(kinds))})", "one kind in all layers")


QWEN2 = Family("qwen2", Qwen2Config, qkv_bias=True, sliding_window=window_of_all_layers)
