"""A Megatron-Core GPT model from an architecture, a layout and a precision."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layers import (
    block_spec,
    layer_spec,
    transformer_engine_available,
    weight_gradients_can_accumulate,
)
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig


class HiddenStateOutput(ColumnParallelLinear):
    """The output layer's weight without its product: forward returns the hidden states.

    Log-probs need the logits of response positions only, and never all at once (``losses.logprobs``). So the model
    ends at the final norm, whole over the tensor-parallel group, and the loss brings hidden states and weight together.
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Hidden states ``[T, 1, H]`` of all positions, gathered where the sequence is sharded.

        The gradient that comes back is the share of this rank's vocabulary; both ways out sum it over the group.
        """
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True), None
        return copy_to_tensor_model_parallel_region(input_), None


def _leave_empty(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    use_transformer_engine: bool,
    frozen: bool = False,
) -> TransformerConfig:
    """Megatron-Core's config of a dense decoder; ``frozen`` weights never change.

    Raises:
        InputError: The sizes do not divide.
    """
    check_sizes(architecture, parallel, precision)
    window, factor = architecture.sliding_window, architecture.attention_factor
    recompute: dict[str, Any] = {} if parallel.recompute == "none" else {"recompute_granularity": parallel.recompute}
    if parallel.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=_windowed_layers(architecture),
        # Rotary scaling may multiply queries and keys, all of them: their products grow by its square.
        softmax_scale=None if factor == 1 else factor**2 / math.sqrt(architecture.head_dim),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Every weight is read from a folder, so nothing is drawn at random first. Initialization itself stays on: it
        # also marks which parameters are shards, without which the norm of the gradient misses the other ranks' parts.
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        embedding_init_method=_leave_empty,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        cp_comm_type=parallel.context_communication,
        sequence_parallel=parallel.sequence,
        # Losses are sums; one division by the number of pairs (or tokens) of the whole batch follows, whatever the
        # microbatches and ranks they came in.
        calculate_per_token_loss=True,
        variable_seq_lengths=parallel.pipeline > 1,
        # Between two stages an interleaved schedule sends activations and gradients both ways at once. One batch of
        # sends matches them by order alone and mistakes one for the other; apart, each has its own group.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        # Names a dispatcher of experts, of which there are none: the default refuses variable lengths.
        moe_token_dispatcher_type="alltoall",
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        # Megatron's fusions are compiled kernels for the GPU.
        bias_activation_fusion=use_transformer_engine,
        bias_dropout_fusion=use_transformer_engine,
        masked_softmax_fusion=use_transformer_engine,
        apply_rope_fusion=use_transformer_engine,
        gradient_accumulation_fusion=not frozen and weight_gradients_can_accumulate(),
        tp_comm_overlap=parallel.overlap_tensor,
        **precision.megatron_arguments(frozen),
        **recompute,
    )


def _windowed_layers(architecture: Architecture) -> list[int] | None:
    """1 for each layer that has the window and 0 for the others; ``None`` where all or none have it."""
    full = set(architecture.full_layers)
    return [int(layer not in full) for layer in range(architecture.num_layers)] if full else None


def check_sizes(architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Stop with an ``InputError`` where a model cannot be cut up so; process groups need not be there."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if architecture.num_layers % chunks:
        raise InputError(
            "parallel.pipeline",
            f"{chunks} chunks for a model of {architecture.num_layers} layers",
            "a number of chunks that divides the layers",
        )
    for what in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(architecture, what) % parallel.tensor:
            raise InputError(
                "parallel.tensor",
                f"{parallel.tensor} for a model of {what} {getattr(architecture, what)}",
                f"a size that divides {what}",
            )
    if parallel.context > 1 and parallel.context_communication == "a2a":
        groups = architecture.num_query_groups // parallel.tensor
        if groups % parallel.context:
            found = f"{parallel.context} with {groups} key and value heads a tensor-parallel rank"
            raise InputError("parallel.context", found, "a size that divides them, or context_communication p2p")
    if parallel.context > 1 and parallel.context_communication == "p2p" and architecture.sliding_window is not None:
        raise InputError("parallel.context_communication", "p2p for a model with a sliding window", "a2a")
    query_width = architecture.num_attention_heads * architecture.head_dim
    precision.check_width("hidden_size", architecture.hidden_size, 1)
    precision.check_width("the width of all query heads", query_width, parallel.tensor)
    precision.check_width("ffn_hidden_size", architecture.ffn_hidden_size, parallel.tensor)


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding once every rank of the tensor-parallel group holds equally many."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def build_gpt(
    architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig, frozen: bool = False
) -> list[GPTModel]:
    """The model chunks of this rank, on its device, weights not yet set.

    Args:
        architecture: The model.
        parallel: The layout; process groups must be there.
        precision: Number formats.
        frozen: The weights will never change; they may be held in a format that cannot be trained.

    Returns:
        One ``GPTModel``, or one a virtual pipeline stage; forward of the last one returns hidden states ``[1, T, H]``.

    Raises:
        InputError: The sizes of architecture, layout and formats do not fit, or the machine lacks the formats.
    """
    precision.check_device()
    use_te = transformer_engine_available()
    config = transformer_config(architecture, parallel, precision, use_te, frozen)
    layer = layer_spec(architecture.qk_norm, use_te)
    chunks = parallel.virtual_pipeline or 1
    block = block_spec(layer, architecture.num_layers // (parallel.pipeline * chunks), use_te)
    return [
        _build_chunk(architecture, parallel, config, block, vp_stage if chunks > 1 else None)
        for vp_stage in range(chunks)
    ]


def _build_chunk(
    architecture: Architecture,
    parallel: ParallelConfig,
    config: TransformerConfig,
    block: object,
    vp_stage: int | None,
) -> GPTModel:
    at = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size(architecture.vocab_size, parallel.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(architecture.rope_theta),
        vp_stage=vp_stage,
    )
    # Megatron scales frequencies for one kind of rope; the architecture holds those of whatever kind the model names.
    model.rotary_pos_emb.inv_freq = torch.tensor(
        architecture.inv_freq, dtype=torch.float32, device=model.rotary_pos_emb.inv_freq.device
    )
    if model.post_process:
        # Nothing of the layer changes but what its forward returns, so parameters and checkpoint keys stay Megatron's.
        model.output_layer.__class__ = HiddenStateOutput
    return model
