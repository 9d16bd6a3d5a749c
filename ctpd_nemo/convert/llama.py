"""Llama 2 and Llama 3.x."""

from transformers import LlamaConfig

from ctpd_nemo.convert.family import Family

LLAMA = Family("llama", LlamaConfig, refused_flags=("attention_bias", "mlp_bias"))
