"""Silence what libraries say that means nothing to a user, each at its own source.

``before_imports`` runs before the libraries are imported, as some of them speak while they are.
"""

import logging
import os
import threading
import warnings

_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "megatron",
    "megatron.core",
    "nv_one_logger",
    "torch.distributed",
    "torch.distributed.elastic",
    "torch.utils.cpp_extension",  # a CUDA build of torch on a machine without a GPU
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
    "invalid escape sequence",  # in the source of libraries, where Python 3.12 compiles it for the first time
)


def before_imports() -> None:
    """Set filters and log levels; has no effect on this project's own messages."""
    # Torch reads it when it is imported. Where one rank has ended, its warnings tell the others' lost connections to
    # it, a page of frames each; its errors are told.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    # A log file on a full disk: each line that it has no room for would be a traceback on the terminal.
    logging.raiseExceptions = False
    threading.excepthook = _without_tensorboard
    for module in ("lightning", "megatron", "nemo", "pydantic", "torch.distributed"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")
    _lower_loggers()


def after_imports() -> None:
    """Once more: NeMo and Lightning set the levels of their own loggers when they are imported."""
    from nemo.utils import logging as nemo_logging
    from nv_one_logger.api.one_logger_provider import OneLoggerProvider
    from transformers.utils import logging as transformers_logging

    # NeMo's telemetry counts on one training a process, and writes its complaints to the working folder.
    OneLoggerProvider.instance().force_disable_logging()
    nemo_logging.setLevel(logging.ERROR)
    # An error of its own, of torchrun on several nodes: "this is not tested in NeMo".
    logging.getLogger("nemo_logger").addFilter(lambda record: "without SLURM" not in record.getMessage())
    transformers_logging.set_verbosity_error()
    # A bar for every read and write of a few tensors.
    transformers_logging.disable_progress_bar()
    _lower_loggers()


def _without_tensorboard(ended: threading.ExceptHookArgs) -> None:
    """A thread of TensorBoard that a full disk ends hands its error over, which is told as one line."""
    if not (isinstance(ended.exc_value, OSError) and type(ended.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(ended)


def _lower_loggers() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Where telemetry is off, as on every rank but the first, it says so at every step, at levels that it sets anew.
    telemetry = logging.getLogger("nv_one_logger")
    telemetry.propagate = False
    if not telemetry.handlers:
        telemetry.addHandler(logging.NullHandler())
