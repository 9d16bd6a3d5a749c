"""Tensor-parallel communication that runs while the products around it do: Transformer Engine's userbuffers.

The buffers are registered once, for one number of tokens and one width. Microbatches are therefore filled with padding
up to the token budget where this is on, and models of another width cannot run beside the one that they are made for.
"""

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layers import transformer_engine_available
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig

# What a rank's tokens must be a multiple of where they are gathered with their scales.
_MXFP8_TOKENS = 128
# The shape that buffers are there for; like the buffers, one for the process.
_current: dict[str, tuple[int, int, int, str | None]] = {}


def check_userbuffers(parallel: ParallelConfig, precision: PrecisionConfig, num_tokens: int) -> None:
    """Stop with an ``InputError`` where a layout asks for buffers that this machine or recipe cannot have.

    Args:
        parallel: The layout.
        precision: Number formats of the products.
        num_tokens: Tokens of every microbatch, padding included.
    """
    if not parallel.overlap_tensor:
        return
    # ``fill_userbuffers_buffer_for_all_gather`` of Transformer Engine 2.11.
    if precision.fp8 == "blockwise":
        raise InputError("parallel.overlap_tensor", "true with precision.fp8 blockwise", "another recipe, or false")
    shares = parallel.token_shares()
    if precision.fp8 == "mxfp8" and num_tokens % (_MXFP8_TOKENS * shares):
        found = f"{num_tokens} with parallel.overlap_tensor, mxfp8 and {shares} shares"
        raise InputError("data.microbatch_tokens", found, f"a multiple of {_MXFP8_TOKENS * shares}")
    if not transformer_engine_available():
        raise InputError("parallel.overlap_tensor", "true without them", "GPUs and Transformer Engine")


def prepare_userbuffers(
    parallel: ParallelConfig, precision: PrecisionConfig, num_tokens: int, hidden_size: int
) -> None:
    """Make the buffers of a job, where its layout asks for them; process groups must be there.

    Args:
        parallel: The layout; does nothing unless ``overlap_tensor`` is set.
        precision: Number formats of the products.
        num_tokens: Tokens of every microbatch, padding included.
        hidden_size: Width of the model.

    Raises:
        InputError: See ``check_userbuffers``.
    """
    if not parallel.overlap_tensor:
        return
    check_userbuffers(parallel, precision, num_tokens)
    from transformer_engine.pytorch.module import base as engine

    wanted = (num_tokens // parallel.context, hidden_size, parallel.tensor, precision.fp8)
    if _current.get("shape") == wanted:
        return
    if _current:
        engine.destroy_ub()
    quantized = engine.UserBufferQuantizationMode
    modes = [quantized.NONE if precision.fp8 is None else quantized.FP8]
    if precision.bf16_first_layers or precision.bf16_last_layers:
        modes.append(quantized.NONE)
    engine.initialize_ub(
        shape=list(wanted[:2]), tp_size=parallel.tensor, quantization_modes=modes, bootstrap_backend="nccl"
    )
    _current["shape"] = wanted
