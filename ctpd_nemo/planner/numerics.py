"""How many bytes a number takes, by precision and place."""

from dataclasses import dataclass

from ctpd_nemo.errors import InputError


@dataclass(frozen=True)
class Numerics:
    """Number formats of a job. Gradients and optimizer state are fp32 in all of them.

    Attributes:
        name: ``precision.dtype``.
        element_bytes: Of a weight, and of an activation.
        main_bytes: Of the optimizer's own copy of a weight; 0 where the weight is that copy.
        matmul: The rate that matrix products run at: "bf16", "fp8" or "fp32".
        input_bytes: What a linear layer keeps of each element of its input.
        weight_copy_bytes: FP8 copies of each weight that Transformer Engine keeps beside it, by row and by column.
    """

    name: str
    element_bytes: int
    main_bytes: int
    matmul: str
    input_bytes: float
    weight_copy_bytes: int = 0


# Scales: one a tensor, one fp32 in 128 elements, one byte in 32.
_NUMERICS = (
    Numerics("fp32", 4, 0, "fp32", 4),
    Numerics("bf16", 2, 4, "bf16", 2),
    Numerics("fp8_delayed", 2, 4, "fp8", 1, 2),
    Numerics("fp8_current", 2, 4, "fp8", 1, 2),
    Numerics("fp8_blockwise", 2, 4, "fp8", 1 + 4 / 128, 2),
    Numerics("mxfp8", 2, 4, "fp8", 1 + 1 / 32, 2),
)
NUMERICS = {numerics.name: numerics for numerics in _NUMERICS}


def numerics_of(name: str) -> Numerics:
    """The formats that a precision stands for.

    Raises:
        InputError: There is no such precision.
    """
    if name not in NUMERICS:
        raise InputError("precision.dtype", repr(name), "one of " + ", ".join(NUMERICS))
    return NUMERICS[name]
