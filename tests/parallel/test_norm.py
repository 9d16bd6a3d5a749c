"""RMSNorm against its formula in fp64."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ctpd_nemo.parallel.norm import RMSNorm
from tests.rounding import Rounded, assert_within, of_sum, unit

WIDTH, EPS = 24, 1e-5


def norm(dtype: torch.dtype = torch.float32, **config: object) -> RMSNorm:
    made = RMSNorm(
        TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=2, params_dtype=dtype, **config),
        WIDTH,
        eps=EPS,
    )
    made.weight.data = (1 + 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))).to(dtype)
    return made


def rounded(x: Tensor, weight: Tensor) -> tuple[Rounded, Rounded, Rounded]:
    """The output, and the gradients of the sum of its squares, in closed form, with how far rounding moves them."""
    x, weight = Rounded.given(x.squeeze(1)), Rounded.given(weight)
    root = ((x * x).sum(keepdim=True) / WIDTH + EPS).sqrt()
    unit = x / root
    output = unit * weight
    of_weight = (2 * output * unit).sum(0)
    of_unit = 2 * output * weight
    of_x = (of_unit - unit * ((of_unit * unit).sum(keepdim=True) / WIDTH)) / root
    return output.unsqueeze(1), of_x.unsqueeze(1), of_weight


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_output_and_gradients_are_those_of_the_formula(scale: float) -> None:
    module = norm()
    x = (scale * torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(1))).requires_grad_()
    found = module(x)
    found.square().sum().backward()
    output, of_x, of_weight = rounded(x, module.weight)
    assert_within(found, output)
    assert_within(x.grad, of_x)
    assert_within(module.weight.grad, of_weight)
    exact, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    expected.square().sum().backward()
    for here, there in ((output, expected.detach()), (of_x, exact.grad), (of_weight, weight.grad)):
        torch.testing.assert_close(here.exact, there, rtol=1e-9, atol=0)


def test_squares_of_bf16_are_averaged_in_fp32() -> None:
    module = norm(torch.bfloat16, bf16=True)
    x = (300 * torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(1))).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * module.weight.double()
    assert module(x).dtype == torch.bfloat16
    # One rounding of the quotient, one of the product, in bf16; the sum of the squares is in fp32.
    torch.testing.assert_close(module(x).double(), exact, rtol=2.1 * unit(torch.bfloat16) + of_sum(WIDTH + 8), atol=0)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_weight_is_marked_where_its_gradient_is_a_partial_sum(sequence: bool) -> None:
    size = 2 if sequence else 1
    made = norm(sequence_parallel=sequence, tensor_model_parallel_size=size)
    assert made.weight.sequence_parallel is sequence
