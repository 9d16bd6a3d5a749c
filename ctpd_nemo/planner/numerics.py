"""How many bytes a number takes, by precision and place."""

from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.precision import PrecisionConfig


@dataclass(frozen=True)
class Numerics:
    """Number formats of a model. Gradients and optimizer state are fp32 in all of them.

    Attributes:
        element_bytes: Of a weight, and of an activation.
        main_bytes: Of the optimizer's own copy of a weight; 0 where the weight is that copy.
        matmul: The rate that the products of the layers run at: "bf16", "fp8" or "fp32".
        input_bytes: What a linear layer keeps of each element of its input.
        linear_bytes: Of a weight of a linear layer, with the copies that Transformer Engine keeps beside it.
        fp8_share: Share of the layers whose products are in FP8.
    """

    element_bytes: int
    main_bytes: int
    matmul: str
    input_bytes: float
    linear_bytes: float
    fp8_share: float = 0.0


def numerics_of(precision: PrecisionConfig, architecture: Architecture, frozen: bool = False) -> Numerics:
    """The formats of a model; ``frozen`` weights never change.

    Layers that stay in bf16 count by their share of the model, wherever they are.
    """
    element = 4 if precision.dtype == "fp32" else 2
    main = 0 if element == 4 else 4
    if precision.fp8 is None:
        return Numerics(element, main, precision.dtype, element, element)
    kept_in_bf16 = precision.bf16_first_layers + precision.bf16_last_layers
    share = max(0.0, 1 - kept_in_bf16 / architecture.num_layers)
    one = precision.fp8_bytes
    # FP8 by row for the forward pass, by column for the backward pass, beside the bf16 weight unless that is given up.
    linear = precision.frozen_matrix_bytes if frozen else element + 2 * one
    return Numerics(
        element_bytes=element,
        main_bytes=main,
        matmul="fp8",
        input_bytes=share * one + (1 - share) * element,
        linear_bytes=share * linear + (1 - share) * element,
        fp8_share=share,
    )
