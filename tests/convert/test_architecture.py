"""What ``config.json`` says, against the ``transformers`` configuration and model of the same folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.errors import InputError

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def write_config(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**SIZES, **values}))
    return folder


def test_every_field_is_that_of_the_saved_model(family_case: str, tiny_model: Callable) -> None:
    tiny = tiny_model(family_case)
    architecture = read_architecture(tiny.folder)
    attention, config = tiny.model.model.layers[0].self_attn, tiny.model.config
    assert architecture.family == config.model_type
    assert architecture.num_layers == len(tiny.model.model.layers)
    assert (architecture.vocab_size, architecture.hidden_size) == tuple(tiny.model.model.embed_tokens.weight.shape)
    assert architecture.ffn_hidden_size == tiny.model.model.layers[0].mlp.up_proj.out_features
    assert architecture.num_attention_heads * architecture.head_dim == attention.q_proj.out_features
    assert architecture.num_query_groups * architecture.head_dim == attention.k_proj.out_features
    assert architecture.head_dim == attention.head_dim
    assert architecture.norm_eps == tiny.model.model.norm.variance_epsilon
    assert architecture.tied_embeddings == (tiny.model.lm_head.weight is tiny.model.model.embed_tokens.weight)
    assert architecture.qkv_bias == (attention.q_proj.bias is not None)
    assert architecture.qk_norm == hasattr(attention, "q_norm")
    in_all = config.to_dict().get("sliding_window")
    for index, layer in enumerate(tiny.model.model.layers):
        window = None if index in architecture.full_layers else architecture.sliding_window
        assert window == getattr(layer.self_attn, "sliding_window", in_all)
    assert architecture.attention_factor == tiny.model.model.rotary_emb.attention_scaling
    assert architecture.max_position_embeddings == 128
    assert architecture.dtype == torch.float32


def test_rotary_frequencies_are_those_of_the_model_bit_for_bit(family_case: str, tiny_model: Callable) -> None:
    tiny = tiny_model(family_case)
    inv_freq = torch.tensor(read_architecture(tiny.folder).inv_freq)
    assert torch.equal(inv_freq, tiny.model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaling_written_by_transformers_4_and_5_reads_the_same(scaling: dict[str, Any], tmp_path: Path) -> None:
    older = write_config(tmp_path, model_type="llama", rope_theta=500000.0, rope_scaling=scaling)
    from_older = read_architecture(older)
    newer = write_config(tmp_path, model_type="llama", rope_parameters={"rope_theta": 500000.0, **scaling})
    from_newer = read_architecture(newer)
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0, **scaling})
    model = AutoModelForCausalLM.from_config(config)
    assert from_older == from_newer
    assert from_older.rope_theta == 500000.0
    assert torch.equal(torch.tensor(from_older.inv_freq), model.model.rotary_emb.inv_freq)


def test_older_scaling_key_type_and_torch_dtype_are_read(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path, model_type="llama", rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16"
    )
    architecture = read_architecture(folder)
    assert architecture.inv_freq[0] == 0.5
    assert architecture.dtype == torch.bfloat16


def test_llama_1_style_config_without_groups_has_as_many_as_heads(tmp_path: Path) -> None:
    values = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    assert read_architecture(tmp_path).num_query_groups == 6


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_sliding_window_counts_only_where_layers_use_it(model_type: str, tmp_path: Path) -> None:
    def windows(**values: Any) -> tuple[int | None, tuple[int, ...]]:
        found = read_architecture(write_config(tmp_path, model_type=model_type, sliding_window=9, **values))
        return found.sliding_window, found.full_layers

    assert windows(use_sliding_window=False) == (None, ())
    assert windows(use_sliding_window=True, max_window_layers=4) == (None, ())
    assert windows(use_sliding_window=True, max_window_layers=0) == (9, ())
    assert windows(use_sliding_window=True, max_window_layers=2) == (9, (0, 1))
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, layer_types=kinds) == (9, (1, 3))
    with pytest.raises(InputError, match=r"sliding_attention in layer_types, sliding_window = None"):
        windows(layer_types=kinds)


def test_mistral_with_layer_types_is_ministral(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    folder = write_config(tmp_path, model_type="mistral", head_dim=8, sliding_window=9, layer_types=kinds)
    architecture = read_architecture(folder)
    assert (architecture.family, architecture.sliding_window, architecture.full_layers) == ("ministral", 9, (3,))


def test_unknown_family_stops_with_the_list_of_known_ones(tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="gpt_oss")
    with pytest.raises(InputError, match="'gpt_oss'; expected one of the known families: llama, mistral, qwen2, qwen3"):
        read_architecture(folder)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(InputError, match=r"config\.json: found no JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="found a JSON list; expected a JSON object"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"vocab_size": "131"}, "vocab_size = '131'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"head_dim": 7}, "head_dim"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rotary type 'proportional'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: found {'quant_method': 'fp8'}"),
        ({"is_causal": None}, "is_causal: found None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "['LlamaForSequenceClassification']"),
        ({"\x1b[2J": 1}, r"'\x1b[2J'"),
        ({"rope_scaling": {"rope_type": "unheard-of"}}, "unheard-of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_what_would_change_the_numbers_is_refused(values: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="llama", **values)
    with pytest.raises(InputError, match=r"config\.json.*: found") as error:
        read_architecture(folder)
    assert found in str(error.value)


def test_longrope_knows_the_positions_of_its_short_factors(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    scaling = {"rope_type": "longrope", "factor": 4.0, **factors}
    folder = write_config(tmp_path, model_type="llama", max_position_embeddings=256, rope_scaling=scaling)
    architecture = read_architecture(folder)
    assert architecture.max_position_embeddings == 64
    assert architecture.attention_factor == pytest.approx((1 + math.log(4) / math.log(64)) ** 0.5)


def test_qwen3_attention_bias_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="qwen3", head_dim=8, attention_bias=True)
    with pytest.raises(InputError, match="attention_bias = true"):
        read_architecture(folder)
