"""Mistral: Llama's layers, with one sliding window for all of them in the first releases."""

from typing import Any

from transformers import MistralConfig

from ctpd_nemo.convert.family import Family


def _one_window(config: Any, place: str) -> int | None:
    return config.sliding_window


MISTRAL = Family("mistral", MistralConfig, sliding_window=_one_window)
