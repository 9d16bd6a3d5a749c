"""Mistral: Llama's layers, with one sliding window for all of them in the first releases, or in some (Ministral)."""

from transformers import MinistralConfig, MistralConfig

from ctpd_nemo.convert.family import Family

MISTRAL = Family("mistral", MistralConfig, window_keys=("sliding_window",))
MINISTRAL = Family("ministral", MinistralConfig, window_keys=("sliding_window", "layer_types"))
