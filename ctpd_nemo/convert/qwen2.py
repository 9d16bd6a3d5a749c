"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from transformers import Qwen2Config

from ctpd_nemo.convert.family import Family

# transformers slides the window in the layers from max_window_layers on, unless layer_types says which.
WINDOW_KEYS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")

QWEN2 = Family("qwen2", Qwen2Config, qkv_bias=True, window_keys=WINDOW_KEYS)
