"""Model shapes as ``config.json`` states them, folders of them without weights, and the operations they take."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctpd_nemo.convert.architecture import Architecture

_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
_LLAMA3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 1e6}
_QWEN2 |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOY |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True}

# Sizes from the config.json of each model.
STUDENTS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
    "llama-3.1-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    | {"tie_word_embeddings": False, "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0}},
    "toy": _TOY | {"model_type": "llama", "vocab_size": 0},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN2
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen2.5-14b": _QWEN2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
    "toy": _TOY | {"model_type": "qwen2", "vocab_size": 0},
}


def write_folder(folder: Path, config: dict[str, Any], tokenizer: Path, layers: int) -> None:
    """A model folder without weights: ``config.json``, and the files of a tokenizer.

    Args:
        folder: Made here.
        config: One of the shapes; a ``vocab_size`` of 0 becomes what the tokenizer needs.
        tokenizer: Folder of the tokenizer.
        layers: How many; 0 for all of the shape's.
    """
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            os.symlink(file.resolve(), folder / file.name)
    rows = config["vocab_size"] or _ids(tokenizer)
    config = config | {"vocab_size": rows, "num_hidden_layers": layers or config["num_hidden_layers"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _ids(tokenizer: Path) -> int:
    from transformers import AutoTokenizer

    return max(AutoTokenizer.from_pretrained(tokenizer).get_vocab().values()) + 1


def parameters(architecture: Architecture) -> int:
    """Weights of the matrices: the layers', the embedding and, where it is not tied, the output layer."""
    vocabulary = architecture.vocab_size * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)
    return architecture.num_layers * _layer_weights(architecture) + vocabulary


def forward_flops(architecture: Architecture, lengths: Iterable[int], response_tokens: int) -> float:
    """Operations that a forward pass needs: 2 a weight and token, and those of causal attention.

    A backward pass needs twice as many. What is computed again, or for padding, is not counted.

    Args:
        architecture: Of the model.
        lengths: Tokens of each sequence.
        response_tokens: At how many positions the output layer runs.
    """
    lengths = list(lengths)
    layers = 2.0 * architecture.num_layers * _layer_weights(architecture) * sum(lengths)
    seen = sum(length * (length + 1) // 2 for length in lengths)
    attention = 4.0 * architecture.num_layers * architecture.num_attention_heads * architecture.head_dim * seen
    head = 2.0 * architecture.vocab_size * architecture.hidden_size * response_tokens
    return layers + attention + head


def _layer_weights(architecture: Architecture) -> int:
    heads = architecture.num_attention_heads + architecture.num_query_groups
    return architecture.hidden_size * (2 * heads * architecture.head_dim + 3 * architecture.ffn_hidden_size)
