"""Silence what libraries say that means nothing to a user, each at its own source.

``before_imports`` runs before the libraries are imported, as some of them speak while they are.
"""

import logging
import os
import warnings

_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "megatron",
    "megatron.core",
    "nv_one_logger",
    "torch.distributed",
    "torch.distributed.elastic",
)
# Message starts, with why each says nothing to a user of this project.
_MESSAGES = (
    "Transformer Engine and Apex are not installed",  # local implementations are what a machine without a GPU runs
    "Apex is not installed",
    "Future Hydra versions will no longer change working directory",
    "The `?srun` command is available on your system",
    ".*does not have many workers which may be a bottleneck",  # the loaders are sized by data.num_workers
    ".*Consider increasing the value of the `num_workers` argument",
    "Please use the new API settings to control TF32",
)


def before_imports() -> None:
    """Set filters and log levels; has no effect on this project's own messages."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    for module in ("lightning", "megatron", "nemo", "pydantic", "torch.distributed"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers draws a bar for every read and write of a few tensors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def after_imports() -> None:
    """NeMo's logger sets its own level when it is imported."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
