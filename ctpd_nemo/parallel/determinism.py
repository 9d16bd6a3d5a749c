"""The same numbers twice: what PyTorch, cuBLAS, NCCL and Transformer Engine must be told for it.

On one device every kernel then adds in an order of its own that never changes. Megatron-Core asks for the same: its
``deterministic_mode``, ``NVTE_ALLOW_NONDETERMINISTIC_ALGO=0`` and a fixed algorithm of NCCL (``validate_args`` in
Megatron-LM's ``training/arguments.py``).
"""

import os

import torch

from ctpd_nemo.errors import InputError

# What each library reads, the value it gets where nobody has set one, and the others that serve as well.
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":16:8",)),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ()),
    "NCCL_ALGO": ("Ring", ("Tree", "CollnetDirect", "CollnetChain", "^NVLS")),
}


def set_deterministic(on: bool) -> None:
    """Make everything that this process computes from here on the same each time; or leave it free to be faster.

    Libraries read the environment when they first use the GPU, so a job calls it before it makes process groups.
    ``models.gpt.transformer_config`` reads PyTorch's setting and tells Megatron-Core.

    Raises:
        InputError: The environment says something else.
    """
    if on:
        check_environment()
        for name, (value, _) in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on)


def check_environment() -> None:
    """Stop where an environment variable keeps a library from being deterministic.

    Raises:
        InputError: Names it.
    """
    for name, (value, others) in _ENVIRONMENT.items():
        found = os.environ.get(name, value)
        if found not in (value, *others):
            expected = " or ".join((value, *others)) + ", or nothing, with deterministic=true"
            raise InputError(f"environment, {name}", repr(found), expected)
