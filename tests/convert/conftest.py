"""Tiny random Hugging Face models of every family, saved as folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}

_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "llama-rope3-tied": LlamaConfig(**_SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE),
    "qwen2": Qwen2Config(**_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2-tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES, head_dim=12),
    "qwen3-tied": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SIZES, head_dim=12, sliding_window=5),
    "qwen3-yarn": Qwen3Config(**_SIZES, head_dim=16, rope_parameters=_YARN_ROPE),
    "qwen2-windows": Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "ministral": MinistralConfig(
        **_SIZES, head_dim=12, sliding_window=5, layer_types=["full_attention", "sliding_attention"] * 2
    ),
    "mistral-tied": MistralConfig(**_SIZES, sliding_window=None, tie_word_embeddings=True),
}


@dataclass(frozen=True)
class TinyModel:
    """A model in memory and the folder it was saved to."""

    folder: Path
    model: PreTrainedModel


def randomised(model: PreTrainedModel) -> None:
    """No weight keeps a default: biases that are zero or norms that are one would hide a wrong place."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """``tiny_model(name)``: the fp32 model ``CONFIGS[name]``, saved once in shards of at most 40 kB."""
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
            randomised(model)
            folder = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(folder, max_shard_size="40KB")
            made[name] = TinyModel(folder, model)
        return made[name]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``family_case`` runs for every configuration."""
    if "family_case" in metafunc.fixturenames:
        metafunc.parametrize("family_case", list(CONFIGS))
