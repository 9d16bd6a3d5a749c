"""RMSNorm against its formula in fp64."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from ctpd_nemo.parallel.norm import RMSNorm

WIDTH, EPS = 24, 1e-5


def norm(dtype: torch.dtype = torch.float32, **config: object) -> RMSNorm:
    made = RMSNorm(
        TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=2, params_dtype=dtype, **config),
        WIDTH,
        eps=EPS,
    )
    made.weight.data = (1 + 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))).to(dtype)
    return made


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_output_and_gradients_are_those_of_the_formula(scale: float) -> None:
    module = norm()
    x = (scale * torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(1))).requires_grad_()
    exact, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    found = module(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(module.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)
    error = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-2 if scale == 1e4 else error < 1e-4


def test_squares_of_bf16_are_averaged_in_fp32() -> None:
    module = norm(torch.bfloat16, bf16=True)
    x = (300 * torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(1))).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * module.weight.double()
    assert module(x).dtype == torch.bfloat16
    # One rounding of the quotient, one of the product.
    torch.testing.assert_close(module(x).double(), exact, rtol=2 * 2**-8, atol=0)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_weight_is_marked_where_its_gradient_is_a_partial_sum(sequence: bool) -> None:
    size = 2 if sequence else 1
    made = norm(sequence_parallel=sequence, tensor_model_parallel_size=size)
    assert made.weight.sequence_parallel is sequence
