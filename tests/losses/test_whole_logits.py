"""A loss of whole logits has the value and the gradients of autograd over all of them, and never has all of them."""

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.whole_logits import WholeLogits, loss_of_logits

TOKENS, WIDTH, VOCAB, PADDED = 13, 7, 19, 22


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(PADDED, WIDTH, requires_grad=True)


def sums(logits_CV: Tensor, part: slice) -> Tensor:
    """Sorted, so that a logit's place counts, and with a factor a token, so that the token does."""
    probs_CV = logits_CV.softmax(-1).sort(-1).values
    weighted = probs_CV.square() @ torch.arange(1.0, VOCAB + 1) * torch.arange(1.0, TOKENS + 1)[part]
    return torch.stack([weighted.sum(), probs_CV[:, 0].sum()])


@pytest.mark.parametrize("tokens_at_once", [1, 5, 100])
def test_value_and_gradients_are_those_of_all_logits_at_once(
    tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", tokens_at_once * VOCAB * 8)
    hidden, weight = inputs()
    total, found = loss_of_logits(sums, 2, hidden, weight, VOCAB)
    (3 * total).backward()
    plain_hidden, plain_weight = inputs()
    expected = sums(plain_hidden @ plain_weight[:VOCAB].T, slice(None))
    (3 * expected[0]).backward()
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(total.detach(), found[0])
    for here, there in ((hidden.grad, plain_hidden.grad), (weight.grad, plain_weight.grad)):
        assert float((here - there).norm() / there.norm()) < 1e-6


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
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 2**-7


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight = inputs()
    total, found = loss_of_logits(lambda logits, _: logits.sum()[None], 1, hidden[:0], weight, VOCAB)
    total.backward()
    assert found.tolist() == [0.0]
    assert not weight.grad.any()
    assert WholeLogits(weight, VOCAB)(hidden[:0]).shape == (0, VOCAB)
