"""The largest log-probs and that of the label are those of ``log_softmax``, whatever the chunks."""

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.top_logprobs import top_logprobs
from tests.rounding import Rounded, assert_within

TOKENS, WIDTH, VOCAB, PADDED, K = 13, 7, 19, 22, 5


@pytest.fixture(params=[1, 4 * PADDED, 1000 * PADDED], ids=["token by token", "chunks", "at once"], autouse=True)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", request.param)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(PADDED, WIDTH, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,))


def exactly(hidden: Tensor, weight: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64."""
    every = (hidden.double() @ weight[:VOCAB].double().T).log_softmax(-1)
    return every.gather(1, labels[:, None]).squeeze(1), *every.topk(k)


def loss(label: Tensor, top: Tensor) -> Tensor:
    """Unequal gradients, at the label and at every place."""
    return label.square().sum() + (top.exp() * torch.arange(1, top.shape[1] + 1, dtype=top.dtype)).sum()


def rounded(hidden: Tensor, weight: Tensor, labels: Tensor, k: int) -> tuple[Rounded, Rounded, Rounded, Rounded]:
    """Log-probs of the labels and the largest ones, and the gradients of ``loss``; with how far rounding moves them."""
    of_hidden, of_weight = Rounded.given(hidden), Rounded.given(weight[:VOCAB])
    every = (of_hidden @ of_weight.T).log_softmax()
    words = every.exact.topk(k).indices
    label, top = every.gather(1, labels[:, None]), every.gather(1, words)
    of_label = torch.nn.functional.one_hot(labels, VOCAB) * (2 * label)
    place = torch.zeros(TOKENS, VOCAB).scatter(1, words, torch.arange(1.0, k + 1).expand(TOKENS, k))
    slope = of_label + every.exp() * place
    slope = slope - every.exp() * slope.sum()[:, None]
    return label.squeeze(1), top, slope @ of_weight, slope.T @ of_hidden


@pytest.mark.parametrize("k", [1, K, VOCAB])
def test_values_and_words_are_those_of_log_softmax(k: int) -> None:
    label, top, words = top_logprobs(*inputs(), k, VOCAB)
    of_label, of_top, *_ = rounded(*inputs(), k)
    assert_within(label, of_label)
    assert_within(top, of_top)
    assert torch.equal(words, exactly(*inputs(), k)[2])


@pytest.mark.parametrize("k", [1, K, VOCAB])
def test_gradients_are_those_of_autograd(k: int) -> None:
    hidden, weight, labels = inputs()
    loss(*top_logprobs(hidden, weight, labels, k, VOCAB)[:2]).backward()
    *_, of_hidden, of_weight = rounded(hidden, weight, labels, k)
    assert_within(hidden.grad, of_hidden)
    assert_within(weight.grad[:VOCAB], of_weight)
    assert not weight.grad[VOCAB:].any()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss(*exactly(exact_hidden, exact_weight, labels, k)[:2]).backward()
    torch.testing.assert_close(of_hidden.exact, exact_hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_weight.exact, exact_weight.grad[:VOCAB], rtol=1e-12, atol=1e-12)


def test_no_two_words_are_so_near_that_rounding_decides_which_is_larger() -> None:
    """What the comparison of words is worth."""
    hidden, weight, _ = inputs()
    logits = hidden.double() @ weight[:VOCAB].double().T
    assert logits.sort(-1).values.diff(dim=-1).min() > 1e-4


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, labels = inputs()
    label, top, _ = top_logprobs(hidden[:0], weight, labels[:0], K, VOCAB)
    (label.sum() + top.sum()).backward()
    assert top.shape == (0, K)
    assert not weight.grad.any()


def test_more_words_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="20 largest of 19"):
        top_logprobs(*inputs(), VOCAB + 1, VOCAB)
