"""What sets one model family apart from the others."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """A family of dense decoders: RMSNorm, rotary positions, grouped-query attention, gated SiLU feed-forward.

    Attributes:
        model_type: The ``model_type`` of its ``config.json``.
        config_class: The ``transformers`` class that fills in what ``config.json`` leaves out.
        qkv_bias: The query, key and value projections have biases.
        qk_norm: Queries and keys are normalised head by head.
        refused_flags: Flags of ``config.json`` that add biases Megatron-Core's ``GPTModel`` has no single place for;
            a folder that sets one is refused.
        window_keys: Keys of ``config.json`` that say which layers have a sliding window; none where no layer has.
    """

    model_type: str
    config_class: type[PretrainedConfig]
    qkv_bias: bool = False
    qk_norm: bool = False
    refused_flags: tuple[str, ...] = ()
    window_keys: tuple[str, ...] = ()
