"""The log-prob head on a GPU: against ``log_softmax`` in fp64, and how much memory it takes."""

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.logprobs import token_logprobs


def case(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, generator=draw).cuda().to(dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=draw) / hidden**0.5).cuda().to(dtype)
    return hidden_NH, weight_VH, torch.randint(vocab, (tokens,), generator=draw).cuda(), torch.randn(tokens).cuda()


@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-6, 0.01)]
)
@pytest.mark.parametrize("chunk", [64, 2**20], ids=["many chunks", "one chunk"])
def test_values_and_gradients_are_those_of_log_softmax_in_fp64(
    dtype: torch.dtype,
    value_tolerance: float,
    gradient_tolerance: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    vocab = 5000
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cuda", chunk * vocab)
    hidden, weight, labels, grad = case(500, vocab, 256, dtype)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    value = token_logprobs(*ours, labels, vocab)
    value.backward(grad)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    truth = (exact[0] @ exact[1].T).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    truth.backward(grad.double())
    # A product of bf16 numbers is exact in fp32: the value is as good as with fp32 inputs.
    assert float((value.double() - truth).norm() / truth.norm()) < value_tolerance
    for found, expected in zip(ours, exact, strict=True):
        assert float((found.grad.double() - expected.grad).norm() / expected.grad.norm()) < gradient_tolerance


def test_memory_beyond_weights_and_gradients_is_an_eighth_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, hidden = 4096, 128_256, 2048
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cuda", 2**26)
    hidden_NH, weight_VH, labels_N, grad_N = case(tokens, vocab, hidden, torch.bfloat16)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    peaks = []
    for whole in (True, False):
        hidden_NH.grad, weight_VH.grad = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if whole:
            logits_NV = (hidden_NH @ weight_VH.T).float()
            value_N = logits_NV.log_softmax(1).gather(1, labels_N[:, None]).squeeze(1)
            del logits_NV
        else:
            value_N = token_logprobs(hidden_NH, weight_VH, labels_N, vocab)
        value_N.backward(grad_N)
        # The gradient of the weight, in fp32 and then in bf16, is a gradient, not work space.
        peaks.append(torch.cuda.max_memory_allocated() - before - (0 if whole else 6 * weight_VH.numel()))
        del value_N
    assert peaks[1] <= peaks[0] / 8
