"""What a Hugging Face folder's ``config.json`` says about the model, in the words of this project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctpd_nemo.convert.config_keys import check_keys
from ctpd_nemo.convert.families import find_family
from ctpd_nemo.convert.family import Family
from ctpd_nemo.convert.rope import read_rope
from ctpd_nemo.errors import InputError, shown
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
# SiLU by both of its names.
_ACTIVATIONS = ("silu", "swish")
# Of a config.json; real ones have a kilobyte.
_LARGEST_CONFIG = 2**20


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
        max_position_embeddings: The longest sequence, in tokens, that these rotary frequencies are for.
        norm_eps: Epsilon of all RMSNorms.
        tied_embeddings: The output layer is the embedding.
        qkv_bias: The query, key and value projections have biases.
        qk_norm: Queries and keys are normalised head by head.
        sliding_window: How many tokens each token sees, itself included; None for all before it.
        rope_theta: Base of the rotary frequencies.
        inv_freq: The ``head_dim / 2`` rotary frequencies in radians a token, any scaling applied.
            Each is the fp32 value that ``transformers`` computes.
        dtype: The dtype ``config.json`` names, or None.
        full_layers: The layers, counted from 0, that see all tokens where the others have the window.
        attention_factor: What rotary scaling multiplies both queries and keys by: 1 but for YaRN and LongRoPE.
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
    full_layers: tuple[int, ...] = ()
    attention_factor: float = 1.0


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
    family = find_family(raw, place)
    for key, most in _STATED_SIZES.items():
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            found = f"{key} = {shown(value)}"
            raise InputError(place, found, f"a positive whole number, at most {most:,}")
    read = check_keys(raw, family.config_class, family.window_keys + family.refused_flags, place)
    config = _parse(family, read, place)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_supported(family, config, place)
    _check_sizes(config, head_dim, place)
    rope = read_rope(config, head_dim, place)
    window, full_layers = _windows(family, config, place)
    return Architecture(
        family=family.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=rope.positions,
        norm_eps=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        rope_theta=rope.theta,
        inv_freq=rope.inv_freq,
        dtype=config.dtype,
        full_layers=full_layers,
        attention_factor=rope.attention_factor,
    )


def _read_json_object(folder: Path) -> tuple[dict[str, Any], str]:
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "a Hugging Face model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(str(folder), "no config.json", "a Hugging Face model folder")
    return read_object(path, largest=_LARGEST_CONFIG), str(path)


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
    if config.hidden_act not in _ACTIVATIONS:
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


def _windows(family: Family, config: Any, place: str) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that are without it where others have it."""
    if not family.window_keys:
        return None, ()
    window = config.sliding_window
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise InputError(place, f"layer_types with {', '.join(unknown)}", "full_attention or sliding_attention")
    full_layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full_layers) == config.num_hidden_layers:
        return None, ()
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InputError(place, f"sliding_attention in layer_types, sliding_window = {window!r}", "a window of tokens")
    return window, full_layers
