"""Qwen3, dense: no biases, queries and keys normalised head by head."""

from transformers import Qwen3Config

from ctpd_nemo.convert.family import Family
from ctpd_nemo.convert.qwen2 import WINDOW_KEYS

QWEN3 = Family("qwen3", Qwen3Config, qk_norm=True, refused_flags=("attention_bias",), window_keys=WINDOW_KEYS)
