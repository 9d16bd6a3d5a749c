"""A loss of whole logits has the value and the gradients of autograd over all of them, and never has all of them."""

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.whole_logits import WholeLogits, loss_of_logits
from tests.rounding import Rounded, assert_within, of_sum, unit

TOKENS, WIDTH, VOCAB, PADDED = 13, 7, 19, 22


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(PADDED, WIDTH, requires_grad=True)


def sums(logits_CV: Tensor, part: slice) -> Tensor:
    """Sorted, so that a logit's place counts, and with a factor a token, so that the token does."""
    probs_CV = logits_CV.softmax(-1).sort(-1).values
    places_V, tokens_C = (torch.arange(1, many + 1, dtype=logits_CV.dtype) for many in (VOCAB, TOKENS))
    weighted = probs_CV.square() @ places_V * tokens_C[part]
    return torch.stack([weighted.sum(), probs_CV[:, 0].sum()])


def rounded(hidden: Tensor, weight: Tensor) -> tuple[Rounded, Rounded, Rounded]:
    """Both sums, and the gradients of the first, written out, with how far rounding may move them."""
    of_hidden, of_weight = Rounded.given(hidden), Rounded.given(weight[:VOCAB])
    probs = (of_hidden @ of_weight.T).softmax()
    place = probs.exact.argsort(-1).argsort(-1) + 1.0
    token = torch.arange(1.0, TOKENS + 1)[:, None]
    first = ((probs * probs * place).sum() * token[:, 0]).sum(0)
    # Of the probabilities, then of the logits.
    slope = probs * (2 * place * token)
    slope = probs * (slope - (probs * slope).sum()[:, None])
    second = (probs * (place == 1)).sum().sum(0)
    sums = Rounded(torch.stack([first.exact, second.exact]), torch.stack([first.error, second.error]), first.unit)
    return sums, slope @ of_weight, slope.T @ of_hidden


@pytest.mark.parametrize("tokens_at_once", [1, 5, 100])
def test_value_and_gradients_are_those_of_all_logits_at_once(
    tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", tokens_at_once * VOCAB * 8)
    hidden, weight = inputs()
    total, found = loss_of_logits(sums, 2, hidden, weight, VOCAB)
    (3 * total).backward()
    expected, grad_hidden, grad_weight = rounded(hidden, weight)
    assert_within(found, expected)
    assert torch.equal(total.detach(), found[0])
    assert_within(hidden.grad, 3 * grad_hidden)
    assert_within(weight.grad[:VOCAB], 3 * grad_weight)
    assert not weight.grad[VOCAB:].any()


def test_what_is_written_out_is_what_autograd_finds() -> None:
    """What the comparison is worth; and that no two probabilities are so near that rounding decides their order."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs())
    logits = hidden @ weight[:VOCAB].T
    values = sums(logits, slice(None))
    values[0].backward()
    gradients = values, hidden.grad, weight.grad[:VOCAB]
    for found, expected in zip(rounded(hidden.float(), weight.float()), gradients, strict=True):
        torch.testing.assert_close(found.exact, expected.detach(), rtol=1e-12, atol=1e-12)
    assert logits.sort(-1).values.diff(dim=-1).min() > 1e-4


def test_logits_exist_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 4 * VOCAB * 8)
    seen: list[int] = []

    def recorded(logits_CV: Tensor, part: slice) -> Tensor:
        seen.append(len(logits_CV))
        return sums(logits_CV, part)

    hidden, weight = inputs()
    loss_of_logits(recorded, 2, hidden, weight, VOCAB)[0].backward()
    assert seen == [4, 4, 4, 1]


def test_a_weight_that_is_frozen_gets_no_gradient() -> None:
    hidden, weight = inputs()
    loss_of_logits(sums, 2, hidden, weight.detach(), VOCAB)[0].backward()
    assert weight.grad is None
    assert hidden.grad.any()


def test_without_gradients_the_sums_are_the_same() -> None:
    hidden, weight = inputs()
    with torch.no_grad():
        _, found = loss_of_logits(sums, 2, hidden, weight, VOCAB)
    torch.testing.assert_close(found, loss_of_logits(sums, 2, hidden, weight, VOCAB)[1])


def test_weight_gradients_in_bf16_are_rounded_once_however_many_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, WIDTH, dtype=torch.bfloat16, requires_grad=True) for size in (2048, VOCAB))
    grads = []
    for tokens_at_once in (1, 2048):
        monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", tokens_at_once * VOCAB * 8)
        weight.grad = None
        loss_of_logits(lambda logits, _: logits.logsumexp(-1).sum()[None], 1, hidden, weight, VOCAB)[0].backward()
        grads.append(weight.grad.float())
    # One rounding on either side, and what fp32 sums leave.
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 2 * unit(torch.bfloat16) + of_sum(2048)


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight = inputs()
    total, found = loss_of_logits(lambda logits, _: logits.sum()[None], 1, hidden[:0], weight, VOCAB)
    total.backward()
    assert found.tolist() == [0.0]
    assert not weight.grad.any()
    assert WholeLogits(weight, VOCAB)(hidden[:0]).shape == (0, VOCAB)
