"""RMSNorm for the local layers.

Megatron-Core's plain-torch norm refuses sequence parallelism; all it lacks is the mark by which
``finalize_model_grads`` knows that the gradient of the weight is a partial sum over the tensor-parallel group.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from ctpd_nemo.parallel.layout import local_device


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the constructor that Megatron-Core's layer specs call.

    The square mean runs in fp32 whatever the dtype of the input.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=local_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
