"""The largest log-probs and that of the label are those of ``log_softmax``, whatever the chunks."""

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.top_logprobs import top_logprobs

TOKENS, WIDTH, VOCAB, PADDED, K = 13, 7, 19, 22, 5


@pytest.fixture(params=[1, 4 * PADDED, 1000 * PADDED], ids=["token by token", "chunks", "at once"], autouse=True)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", request.param)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(PADDED, WIDTH, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,))


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    every = (hidden @ weight[:VOCAB].T).log_softmax(-1)
    return every.gather(1, labels[:, None]).squeeze(1), *every.topk(k)


@pytest.mark.parametrize("k", [1, K, VOCAB])
def test_values_and_words_are_those_of_log_softmax(k: int) -> None:
    found = top_logprobs(*inputs(), k, VOCAB)
    for here, there in zip(found, expected(*inputs(), k), strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("k", [1, K, VOCAB])
def test_gradients_are_those_of_autograd(k: int) -> None:
    grads = []
    for function in (lambda *given: top_logprobs(*given, k, VOCAB), lambda *given: expected(*given, k)):
        hidden, weight, labels = inputs()
        label, top, _ = function(hidden, weight, labels)
        # Unequal gradients, at the label and at every place.
        (label.square().sum() + (top.exp() * torch.arange(1.0, k + 1)).sum()).backward()
        grads.append((hidden.grad, weight.grad))
    torch.testing.assert_close(*grads)


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, labels = inputs()
    label, top, _ = top_logprobs(hidden[:0], weight, labels[:0], K, VOCAB)
    (label.sum() + top.sum()).backward()
    assert top.shape == (0, K)
    assert not weight.grad.any()


def test_more_words_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="20 largest of 19"):
        top_logprobs(*inputs(), VOCAB + 1, VOCAB)
