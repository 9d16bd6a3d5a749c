"""Hugging Face folders of small untrained models: a Qwen2-shaped teacher and a Llama-shaped student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# Two query groups let every model be split over two tensor-parallel ranks.
_HEADS = 4
_QUERY_GROUPS = 2
_MAX_POSITIONS = 512

# Narrow models learn faster from larger first weights than the 0.02 of transformers.
_INITIAL_STD = 0.06


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Depth and width of a model.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream; a multiple of 8, for 4 heads of even width.
        ffn_hidden_size: Width of the gated feed-forward.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int


def teacher_config(size: ModelSize, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Qwen2: biases on queries, keys and values, untied, and as in Qwen2 more vocabulary rows than tokens."""
    return Qwen2Config(**_shape(size, tokenizer), vocab_size=-(-len(tokenizer) // 64) * 64, tie_word_embeddings=False)


def student_config(size: ModelSize, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Llama: no biases, tied as in the small models of Llama 3.2."""
    return LlamaConfig(**_shape(size, tokenizer), vocab_size=len(tokenizer), tie_word_embeddings=True)


def _shape(size: ModelSize, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "num_hidden_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_hidden_size,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _QUERY_GROUPS,
        "max_position_embeddings": _MAX_POSITIONS,
        "initializer_range": _INITIAL_STD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write_model(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load: fp32 weights, drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
