"""What a Hugging Face folder's ``config.json`` says about the model, in the words of this project."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ctpd_nemo.convert.families import FAMILIES
from ctpd_nemo.convert.family import Family
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

# transformers would fill these in with the sizes of some 7B model; a model of our own has to state them. At most, each
# is many times that of the largest dense models: names and shapes of tensors are listed by these numbers.
_STATED_SIZES = {
    "hidden_size": 2**21,
    "intermediate_size": 2**23,
    "num_hidden_layers": 20_000,
    "num_attention_heads": 2**14,
    "vocab_size": 2**25,
}

# Rotary types whose frequencies do not depend on the length of the sequence at hand.
_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """A dense decoder, as its ``config.json`` describes it.

    Attributes:
        family: Its ``model_type``, a key of :data:`~ctpd_nemo.convert.families.FAMILIES`.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of the gate, and of the up projection.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        head_dim: Width of one head; ``num_attention_heads * head_dim`` need not be ``hidden_size``.
        vocab_size: Rows of the embedding, without padding. Not the size of the tokenizer, which may be smaller.
        max_position_embeddings: The longest sequence, in tokens.
        norm_eps: Epsilon of all RMSNorms.
        tied_embeddings: The output layer is the embedding.
        qkv_bias: The query, key and value projections have biases.
        qk_norm: Queries and keys are normalised head by head.
        sliding_window: How many tokens each token sees, itself included; None for all before it.
        rope_theta: Base of the rotary frequencies.
        inv_freq: The ``head_dim / 2`` rotary frequencies in radians a token, any scaling applied.
            Each is the fp32 value that ``transformers`` computes.
        dtype: The dtype ``config.json`` names, or None.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    rope_theta: float
    inv_freq: tuple[float, ...]
    dtype: torch.dtype | None


def read_architecture(folder: str | Path) -> Architecture:
    """Read ``folder/config.json``, as written by ``transformers`` 4 or 5.

    Raises:
        InputError: Not a folder, no ``config.json``, malformed, a family that is not known, or a feature that would
            change the numbers and is not supported.
    """
    return parse_architecture(*_read_json_object(Path(folder)))


def parse_architecture(raw: dict[str, Any], place: str) -> Architecture:
    """The architecture that the content of a ``config.json`` describes; ``place`` names it in errors.

    Raises:
        InputError: A family that is not known, or a feature that would change the numbers and is not supported.
    """
    family = _family(raw, place)
    for key, most in _STATED_SIZES.items():
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(place, f"{key} = {value!r}", f"a positive whole number, at most {most:,}")
    config = _parse(family, raw, place)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_supported(family, config, place)
    _check_sizes(config, head_dim, place)
    rope_theta, inv_freq = _rope(config, head_dim, place)
    return Architecture(
        family=family.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=family.sliding_window(config, place),
        rope_theta=rope_theta,
        inv_freq=inv_freq,
        dtype=config.dtype,
    )


def _read_json_object(folder: Path) -> tuple[dict[str, Any], str]:
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "a Hugging Face model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(str(folder), "no config.json", "a Hugging Face model folder")
    return read_object(path), str(path)


def _family(raw: dict[str, Any], place: str) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(place, f"model_type = {model_type!r}", f"one of the known families: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _parse(family: Family, raw: dict[str, Any], place: str) -> Any:
    try:
        return family.config_class.from_dict(raw)
    except Exception as error:  # validators over whatever stands there
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(place, reason, f"a configuration that {family.config_class.__name__} accepts") from error


def _check_supported(family: Family, config: Any, place: str) -> None:
    for flag in family.refused_flags:
        if getattr(config, flag, False):
            raise InputError(place, f"{flag} = true", "false: these biases are not supported")
    if config.hidden_act != "silu":
        raise InputError(place, f"hidden_act = {config.hidden_act!r}", "silu")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups < 1 or heads % groups:
        raise InputError(place, f"num_key_value_heads = {groups}", f"a divisor of num_attention_heads = {heads}")


def _check_sizes(config: Any, head_dim: Any, place: str) -> None:
    """What ``transformers`` fills in or takes as it is, and no model can be built of."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 2 <= head_dim <= 2**16 or head_dim % 2:
        raise InputError(place, f"head_dim = {head_dim!r}", "a positive even number")
    longest = config.max_position_embeddings
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise InputError(place, f"max_position_embeddings = {longest!r}", "a positive whole number")
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise InputError(place, f"dtype = {config.dtype!r}", "the name of a dtype of torch")
    eps = config.rms_norm_eps
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise InputError(place, f"rms_norm_eps = {eps!r}", "a number between 0 and 1")


def _rope(config: Any, head_dim: int, place: str) -> tuple[float, tuple[float, ...]]:
    """The rotary base and frequencies, by ``transformers``' own initialisers."""
    # transformers 5 keeps theta and scaling together in rope_parameters; 4 has rope_theta and rope_scaling.
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise InputError(place, f"rope_theta = {theta!r}", "a positive number")
    if kind not in _STATIC_ROPE_TYPES:
        raise InputError(place, f"rotary type {kind!r}", f"one of {', '.join(_STATIC_ROPE_TYPES)}")
    if kind == "default":
        # In transformers 5 this one lives in each model class, not among the initialisers.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inv_freq, attention_scaling = 1.0 / (theta**exponents), 1.0
    else:
        try:
            inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config)
        except Exception as error:  # arithmetic over whatever stands there
            raise InputError(place, f"{kind} rotary parameters that fail ({error!r})", "complete numbers") from error
    if attention_scaling != 1.0:
        raise InputError(place, f"rotary type {kind!r} with attention factor {attention_scaling}", "a factor of 1")
    if not torch.isfinite(inv_freq).all():
        raise InputError(place, f"{kind} rotary parameters that give {inv_freq.tolist()}", "finite frequencies")
    if 2 * len(inv_freq) != head_dim:
        raise InputError(place, f"{len(inv_freq)} rotary frequencies", f"half of head_dim = {head_dim}")
    return float(theta), tuple(inv_freq.tolist())
