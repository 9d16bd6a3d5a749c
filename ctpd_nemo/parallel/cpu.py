"""Run Megatron-Core without a GPU.

Megatron-Core addresses "cuda" by name: factory calls with ``device="cuda"``, ``torch.cuda.current_device()``,
``torch.cuda.synchronize()``, a tracker of CUDA random states, and assertions on ``Tensor.type()`` strings. This module
answers each of them for the CPU, and only where torch sees no GPU. It shows Megatron-Core's modules a stand-in for
the name ``torch``; the real ``torch`` of everybody else stays untouched but for ``Tensor.cuda``, which could only
raise.

Written against Megatron-Core 0.16.1, and run on it, 0.17.1, 0.18.2 and 0.19.2.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

# The modules that name a CUDA device on the paths this project walks.
_MEGATRON_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.utils",
)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes ``device="cuda"`` for the CPU."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


class _Delegate(types.ModuleType):
    """A module with some names of its own; every other name is the real module's."""

    def __init__(self, real: Any, own: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _torch_for_megatron() -> types.ModuleType:
    cuda = _Delegate(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "current_stream": lambda device=None: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            # The tracker of random states works on whichever generator these name.
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "manual_seed": torch.manual_seed,
        },
    )
    factories = {
        name: _on_cpu(getattr(torch, name))
        for name in ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
    }
    return _Delegate(torch, {"cuda": cuda, **factories})


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Make ``Tensor.type()`` name CUDA types, for Megatron's optimizer, which asserts on them. No effect with a GPU."""
    if torch.cuda.is_available():
        yield
        return
    real_type = torch.Tensor.type

    def named_for_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named_for_cuda  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real_type  # type: ignore[method-assign]


@functools.cache
def enable_cpu_execution() -> bool:
    """Answer Megatron-Core's CUDA calls on the CPU; does nothing where torch sees a GPU.

    Returns:
        Whether the CPU stands in for the GPU.
    """
    if torch.cuda.is_available():
        return False
    stand_in = _torch_for_megatron()
    for name in _MEGATRON_MODULES:
        importlib.import_module(name).__dict__["torch"] = stand_in

    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    return True
