"""Attention over packed sequences without Transformer Engine.

Sequences are packed end to end (THD) exactly as on Transformer Engine; each attends to itself only. The block-diagonal
product is computed as a batch: sequences are gathered into ``[sequences, longest, heads, head_dim]`` and go through
``scaled_dot_product_attention``. Padding sits behind each sequence, where the causal mask already hides it.

Under context parallelism every rank gathers the whole sequences and keeps the rows of its own tokens: as much work on
each rank as without. It is here so that the arithmetic around it runs where Transformer Engine, whose ring attention
shares the work out, does not.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from ctpd_nemo.parallel.context import held_tokens, order_of_all


class PackedAttention(torch.nn.Module):
    """Causal core attention on THD input; the ``core_attention`` of the local layer spec.

    All layers, or those that the config names, have a sliding window where it has one.

    Takes the constructor arguments of Megatron-Core's ``DotProductAttention``. Dropout is not supported: preference
    training runs without it, and a reference must be deterministic.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout is {config.attention_dropout}; the local attention has none")
        self.softmax_scale = softmax_scale
        self.context_group = None if pg_collection is None else pg_collection.cp
        # As Megatron-Core's own attention tells which layers have the window; layers are counted over the whole model.
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each packed sequence.

        Args:
            query: ``[T, heads, head_dim]``; under context parallelism the tokens that this rank holds.
            key: ``[T, groups, head_dim]``; ``heads`` is a multiple of ``groups``.
            value: Shaped as ``key``.
            attention_mask: Unused; ``packed_seq_params`` says all there is to say.
            attn_mask_type: Unused; the mask is causal.
            attention_bias: Unused.
            packed_seq_params: ``cu_seqlens_q`` int32 ``[S + 1]`` and ``max_seqlen_q``.

        Returns:
            ``[T, heads * head_dim]``.
        """
        assert packed_seq_params is not None, "the local attention takes packed sequences"
        if self.context_group is None or self.context_group.size() == 1:
            return self._attend(query, key, value, packed_seq_params)
        size, cu_seqlens = self.context_group.size(), packed_seq_params.cu_seqlens_q
        num_tokens = len(query) * size
        order = order_of_all(cu_seqlens, num_tokens, size)

        def whole(x_Thd: Tensor) -> Tensor:
            # Named for another region, it does what is needed here: gather forward, reduce-scatter backward.
            return gather_from_sequence_parallel_region(x_Thd, True, self.context_group).index_select(0, order)

        context = self._attend(whole(query), whole(key), whole(value), packed_seq_params)
        return context.index_select(0, held_tokens(cu_seqlens, num_tokens, size, self.context_group.rank()))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams) -> Tensor:
        """Attention over whole sequences."""
        total, heads, head_dim = query.shape
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = cu_seqlens.diff()
        longest = int(packed_seq_params.max_seqlen_q)
        # slot_T: where each token lies in the padded batch.
        sequence_T = torch.repeat_interleave(
            torch.arange(len(lengths), device=query.device), lengths, output_size=total
        )
        slot_T = torch.arange(total, device=query.device) - cu_seqlens[sequence_T] + sequence_T * longest

        def padded(x_Thd: Tensor) -> Tensor:
            flat = x_Thd.new_zeros(len(lengths) * longest, *x_Thd.shape[1:])
            return flat.index_copy(0, slot_T, x_Thd).unflatten(0, (len(lengths), longest)).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            padded(query),
            padded(key),
            padded(value),
            attn_mask=self._window_mask(longest, query.device),
            is_causal=self.window is None or self.window >= longest,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != heads,
        )
        return context.transpose(1, 2).flatten(0, 1).index_select(0, slot_T).reshape(total, heads * head_dim)

    def _window_mask(self, longest: int, device: torch.device) -> Tensor | None:
        """Bool ``[longest, longest]``, true where a key is seen; ``None`` where the window hides nothing."""
        if self.window is None or self.window >= longest:
            return None
        position = torch.arange(longest, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < self.window)
