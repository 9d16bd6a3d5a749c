"""Weights that are drawn where a folder of them would be read: the folder of an 8B model has 16 GB."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from megatron.core.models.gpt import GPTModel

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.models import base, folder, teacher


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Within this, the models of the package draw their weights and read none."""
    with ExitStack() as stack:
        for module in (base, teacher):
            stack.enter_context(mock.patch.object(module, "load_hf_weights", _draw))
        # There are no files whose headers could be looked at.
        stack.enter_context(mock.patch.object(folder, "SafetensorsFolder"))
        yield


@torch.no_grad()
def _draw(chunks: Sequence[GPTModel], _folder: str, _architecture: Architecture) -> tuple[str, ...]:
    """Normal with a deviation of 0.02, as transformers draws them; norms are one and biases zero."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                # Copied, as a parameter may hold its values in FP8.
                drawn = torch.randn(parameter.shape, device=parameter.device, dtype=chunk.config.params_dtype)
                parameter.copy_(drawn.mul_(0.02))
    return ()
