"""Qwen3, dense: no biases, queries and keys normalised head by head."""

from transformers import Qwen3Config

from ctpd_nemo.convert.family import Family
from ctpd_nemo.convert.qwen2 import window_of_all_layers

QWEN3 = Family(
    "qwen3", Qwen3Config, qk_norm=True, refused_flags=("attention_bias",), sliding_window=window_of_all_layers
)
