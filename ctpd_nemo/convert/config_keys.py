"""Which keys of a ``config.json`` are read, which change no logits, and which stop an import.

A key that is neither read nor known to change nothing is refused by name, also one that the class of the family does
not know: ``transformers`` sets every key as an attribute, and its shared code looks some of them up (``is_causal``
turns the causal mask off). Where ``transformers`` learns a new key, it is refused here until it is read.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from ctpd_nemo.errors import InputError, shown

READ = frozenset(
    {
        "model_type",
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        # As transformers 4 wrote it, which 5 takes into rope_parameters.
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "dtype",
        "torch_dtype",
    }
)
"""Of every family; :class:`~ctpd_nemo.convert.family.Family` names those of its own."""

HARMLESS: dict[str, str] = {
    "transformers_version": "who wrote the file",
    "_name_or_path": "where the model was",
    "name_or_path": "where the model was",
    "_commit_hash": "where the model was",
    "auto_map": "code beside the weights, which never runs",
    "trust_remote_code": "code beside the weights, which never runs",
    "tokenizer_class": "the tokenizer's, which is read from its own files",
    "transformers.js_config": "another program's",
    "unsloth_version": "who trained it",
    "unsloth_fixed": "who trained it",
    "is_llama_config": "a note",
    "initializer_range": "how weights are drawn; all are read",
    "_initializer_range": "how weights are drawn; all are read",
    "attention_dropout": "of training alone, and this training has none",
    "use_cache": "what generation keeps",
    "pretraining_tp": "in how many parts products were summed; transformers 5 makes them whole",
    "bos_token_id": "of generation",
    "eos_token_id": "of generation; what ends a turn is the tokenizer's and the template's to say",
    "output_hidden_states": "how results are handed over",
    "output_attentions": "how results are handed over",
    "attn_implementation": "the kernel that computes the same attention",
    "_attn_implementation_autoset": "the kernel that computes the same attention",
    "_attn_implementation_internal": "the kernel that computes the same attention",
    "_flash_attn_2_enabled": "the kernel that computes the same attention",
    "gradient_checkpointing": "what training keeps in memory",
    "chunk_size_feed_forward": "in how many parts a layer runs, where a family has that; these have not",
    "id2label": "of classifiers",
    "label2id": "of classifiers",
    "num_labels": "of classifiers",
    "problem_type": "of classifiers",
    "finetuning_task": "of classifiers",
    "task_specific_params": "of generation",
    "prefix": "of generation",
}
"""Keys that change no logits, whatever their value, and why."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Features of other families, or of forks, switched off.
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "max_window_layers": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    # What transformers 4 wrote into a full file, as it was unless someone changed it.
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "tf_legacy_loss": (False,),
    "sep_token_id": (None,),
    "decoder_start_token_id": (None,),
}
"""Keys that change no logits at one of these values."""

# In a config.json transformers leaves them to generation.
_GENERATION = frozenset(key for key in vars(GenerationConfig()) if not key.startswith("_"))
_PLAIN = re.compile(r"[A-Za-z_][\w.]*")


def check_keys(
    raw: Mapping[str, Any], config_class: type[PretrainedConfig], read: Collection[str], place: str
) -> dict[str, Any]:
    """The keys that are read, once it is known that no other changes the numbers.

    Args:
        raw: The content of a ``config.json``.
        config_class: The class of ``transformers`` that it belongs to; a value that is the class's own is no change.
        read: Keys that the family reads beside those of every family.
        place: Names the file in errors.

    Raises:
        InputError: It names a key that is not read and may change the numbers.
    """
    defaults = config_class()
    for key, value in raw.items():
        if key in READ or key in read or key in HARMLESS:
            continue
        if key == "pad_token_id":
            _check_pad(value, raw, place)
        elif key not in _GENERATION and not any(_same(value, neutral) for neutral in _neutral(key, defaults)):
            name = key if _PLAIN.fullmatch(key) else repr(key)
            found, expected = (
                f"{shown(value)}, a key that is not read",
                "no such key, or what its class has by default",
            )
            raise InputError(f"{place}, {name}", found, expected)
    return {key: value for key, value in raw.items() if key in READ or key in read}


def _neutral(key: str, defaults: PretrainedConfig) -> list[Any]:
    values = list(NEUTRAL.get(key, ()))
    if _PLAIN.fullmatch(key) and key in vars(defaults):
        values.append(getattr(defaults, key))
    return values


def _same(value: Any, other: Any) -> bool:
    """Equal, and no number that stands for a truth value."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check_pad(value: Any, raw: Mapping[str, Any], place: str) -> None:
    """``transformers`` makes no embedding whose padding lies outside it."""
    rows = raw.get("vocab_size")
    if isinstance(value, int) and isinstance(rows, int) and not -rows <= value < rows:
        raise InputError(f"{place}, pad_token_id", str(value), f"an id below vocab_size = {rows}, or null")
