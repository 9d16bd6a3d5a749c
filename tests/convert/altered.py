"""Every key of a family's config class, altered: what a config.json may say, and two other legal values of each."""

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

Raw = dict[str, Any]

SIZES: Raw = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Each family as it is, and as it is where windows are in use.
BASES: dict[str, list[Raw]] = {
    "llama": [{}],
    "qwen2": [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}],
    "qwen3": [
        {"head_dim": 12},
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ],
    "mistral": [{"sliding_window": 5}],
    "ministral": [{"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}],
}
SLIDING, FULL = "sliding_attention", "full_attention"
VALUES: dict[str, list[Any]] = {
    "vocab_size": [97, 140],
    "hidden_size": [36, 60],
    "intermediate_size": [40, 90],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [4, 12],
    "num_key_value_heads": [1, 3],
    "head_dim": [8, 16],
    "hidden_act": ["gelu", "swish"],
    "max_position_embeddings": [64, 256],
    "rms_norm_eps": [1e-3, 0.1],
    "sliding_window": [3, 7],
    "max_window_layers": [0, 2],
    "layer_types": [[FULL, SLIDING], [SLIDING, FULL], [SLIDING, SLIDING], [FULL, FULL], ["linear_attention", FULL]],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "linear", "factor": 2.0}],
    "dtype": ["bfloat16", "float32"],
    "torch_dtype": ["bfloat16", "float32"],
    "architectures": [["GPT2LMHeadModel"], ["LlamaModel", "LlamaForCausalLM"], []],
    "transformers_version": ["4.2.0", "5.99.0"],
    "initializer_range": [0.3, 0.5],
    "attention_dropout": [0.1, 0.5],
    "pretraining_tp": [2, 4],
    "pad_token_id": [0, 5, -1, 131, None],
    "bos_token_id": [7, None],
    "eos_token_id": [9, [3, 4]],
    "chunk_size_feed_forward": [1, 4],
    "id2label": [{"0": "a"}, {"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}, {"a": 0, "b": 1, "c": 2}],
    "problem_type": ["regression", "multi_label_classification"],
}
# Keys that config.json may have although no class has them as fields: what transformers itself looks up, what its older
# versions and other programs wrote, and what forks of these families mean.
OTHERS: dict[str, list[Any]] = {
    "num_labels": [3, 7],
    "name_or_path": ["a", "b"],
    "_name_or_path": ["a", "b"],
    "_commit_hash": ["a", "b"],
    "output_attentions": [True],
    "attn_implementation": ["eager", "sdpa"],
    "experts_implementation": ["eager", "grouped_mm"],
    "_attn_implementation_internal": ["eager", "sdpa"],
    "_attn_implementation_autoset": [True, False],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.1}}, {"1": {"num_key_value_heads": 1}}],
    "is_causal": [False, None],
    "attention_chunk_size": [3, 7],
    "quantization_config": [{"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, None],
    "fusion_config": [{"a": 1}, None],
    "gradient_checkpointing": [True, False],
    "tie_last_hidden_states": [True, False],
    "tokenizer_class": ["LlamaTokenizer", None],
    "auto_map": [{"AutoModelForCausalLM": "evil.Evil"}, {}],
    "is_decoder": [True, False],
    "add_cross_attention": [True, False],
    "pruned_heads": [{"0": [1]}, {}],
    "tie_encoder_decoder": [True, False],
    "torchscript": [True, False],
    "use_bfloat16": [True, False],
    "use_mrope": [True, False],
    "rope_interleaved": [True, False],
    "unsloth_version": ["1", "2"],
    "original_max_position_embeddings": [32, 64],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_theta": [500.0, 10**6],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, None],
    "head_dim": [8, 16],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "sliding_window": [3, None],
    "use_sliding_window": [True, False],
    "to_dict": ["x", 1],
    "attribute_map": [{"hidden_size": "vocab_size"}, {}],
    "base_model_tp_plan": [{}, None],
    "keys_to_ignore_at_inference": [["x"], []],
    **{
        key: [0.5, 2.0]
        for key in (
            "logit_scale",
            "logits_scaling",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "final_logit_softcapping",
            "attn_logit_softcapping",
            "query_pre_attn_scalar",
            "layer_norm_eps",
            "clip_qkv",
        )
    },
    **{
        key: [True, False]
        for key in (
            "qk_layernorm",
            "use_qk_norm",
            "normalize_embeddings",
            "parallel_residual",
            "use_bidirectional_attention",
        )
    },
    "no_rope_layers": [[1, 0], [0, 0]],
    "num_experts": [4, 8],
    "dual_chunk_attention_config": [{"chunk_size": 8}, {"chunk_size": 4}],
    "some_note": ["a", 1],
}

_DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.3}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 64}


def ropes(head_dim: int) -> list[tuple[str, Raw]]:
    """Rotary parameters: each type, and each of its parameters altered to two other values."""
    half = head_dim // 2
    factors = {"short_factor": [1.0 + 0.1 * at for at in range(half)], "long_factor": [2.0] * half}
    part = {"partial_rotary_factor": [0.5, 1.0]}
    altered: dict[str, tuple[Raw, dict[str, list[Any]]]] = {
        "default": (
            _DEFAULT,
            {"factor": [2.0, 4.0], "partial_rotary_factor": [0.5, 1.0], "mrope_section": [[2, 2], [4]]},
        ),
        "linear": (_LINEAR, {"factor": [1.0, 3.5], "partial_rotary_factor": [0.5, 1.0]}),
        "dynamic": (_DYNAMIC, {"factor": [1.0, 4.0]}),
        "llama3": (
            _LLAMA3,
            {
                "factor": [2.0, 4.0],
                "low_freq_factor": [0.5, 2.0],
                "high_freq_factor": [3.0, 6.0],
                "original_max_position_embeddings": [16, 64],
            },
        ),
        "yarn": (
            _YARN,
            {
                "factor": [2.0, 16.0],
                "attention_factor": [1.0, 0.7],
                "beta_fast": [16.0, 48.0],
                "beta_slow": [0.5, 2.0],
                "mscale": [0.7, 1.0],
                "mscale_all_dim": [0.7, 1.0],
                "truncate": [False, True],
                "original_max_position_embeddings": [16, 64],
            },
        ),
        "longrope": (
            _LONG | factors,
            {
                "factor": [1.0, 4.0],
                "attention_factor": [1.0, 0.7],
                "short_factor": [[1.0] * half, [1.5] * half],
                "long_factor": [[1.0] * half, [3.0] * half],
                "original_max_position_embeddings": [61, 80],
            },
        ),
        "proportional": ({"rope_type": "proportional", "rope_theta": 500.0}, part),
    }
    found = []
    for kind, (base, keys) in altered.items():
        found.append((kind, base))
        found += [(f"{kind}.rope_theta", {**base, "rope_theta": theta}) for theta in (100.0, 10**6)]
        found += [(f"{kind}.{key}", {**base, key: value}) for key, values in keys.items() for value in values]
    # mscale counts only beside mscale_all_dim, and yarn's factor may be left to the lengths.
    both = {"mscale": 1.0, "mscale_all_dim": 0.5}
    found += [("yarn.mscale", _YARN | both), ("yarn.factor", {**_YARN, "factor": None})]
    found.append(("axial", {"rope_type": "axial", "rope_theta": 500.0}))
    return [*found, ("full_attention", {FULL: _DEFAULT, SLIDING: _LINEAR})]


def keys_of(config_class: type[PretrainedConfig]) -> list[str]:
    """Every key that the class has, inherited ones included."""
    named = [field.name for field in fields(config_class)]  # type: ignore[arg-type]
    return list(dict.fromkeys([*named, *config_class().to_dict()]))


def values_of(key: str, default: Any) -> list[Any]:
    """Two other values of a key; of a truth value there is one."""
    if key in VALUES or key in OTHERS:
        return [value for value in VALUES.get(key, OTHERS.get(key, [])) if value != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int | float):
        return [default + 1, default + 2]
    raise AssertionError(f"no values to try for {key} = {default!r}")


def _generation(key: str, value: Any) -> Any:
    given = {"cache_implementation": "static", "max_new_tokens": 5, "assistant_ensemble_weight": 0.5}
    return given.get(key, 1 if isinstance(value, int) else 0.5 if isinstance(value, float) else [[1]])


# All at once: transformers leaves them to generation.
GENERATION: Raw = {
    key: _generation(key, value)
    for key, value in vars(GenerationConfig()).items()
    if not key.startswith("_")
    and not key.endswith("token_id")
    and key not in {*VALUES, "use_cache", "output_hidden_states", "watermarking_config", "compile_config"}
}
