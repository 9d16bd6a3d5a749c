"""Token log-probs against ``log_softmax`` of the whole logits in fp64: values, and both gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.logprobs import token_logprobs
from tests.losses.ranks import SHARED, SHARED_IDS, run_ranks, shared_cases
from tests.rounding import Rounded, assert_within, of_sum, unit

VOCAB, HIDDEN, TOKENS = 37, 12, 23


def case(
    tokens: int = TOKENS, rows: int = VOCAB, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 hidden states, weight of ``rows`` rows, labels in the vocabulary, and a gradient of the log-probs."""
    draw = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, HIDDEN, generator=draw)
    weight = torch.randn(rows, HIDDEN, generator=draw)
    labels = torch.randint(0, VOCAB, (tokens,), generator=draw)
    return hidden, weight, labels, torch.randn(tokens, generator=draw)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient of hidden, gradient of weight; padding rows of the weight get none."""
    hidden, weight = (x.double().detach().requires_grad_() for x in (hidden, weight))
    value = torch.log_softmax(hidden @ weight[:VOCAB].T, dim=1).gather(1, labels[:, None]).squeeze(1)
    value.backward(grad.double())
    return value.detach(), hidden.grad, weight.grad


def rounded(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Rounded, Rounded, Rounded]:
    """The same written out, with how far rounding may move it; of the weight's gradient the rows of the vocabulary."""
    of_hidden, of_weight, of_grad = (Rounded.given(x) for x in (hidden, weight[:VOCAB], grad[:, None]))
    logprobs = (of_hidden @ of_weight.T).log_softmax()
    slope = of_grad * (torch.nn.functional.one_hot(labels, VOCAB) - logprobs.exp())
    return logprobs.gather(1, labels[:, None]).squeeze(1), slope @ of_weight, slope.T @ of_hidden


def assert_rounding_alone(found: tuple[Tensor, Tensor, Tensor], *inputs: Tensor) -> None:
    value, grad_hidden, grad_weight = rounded(*inputs)
    assert_within(found[0], value)
    assert_within(found[1], grad_hidden)
    assert_within(found[2][:VOCAB], grad_weight)
    assert not found[2][VOCAB:].any()


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    value = token_logprobs(hidden, weight, labels, VOCAB)
    assert value.dtype == torch.float32
    value.backward(grad)
    assert (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
    return value.detach(), hidden.grad, weight.grad


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=[1, VOCAB * 5, VOCAB * TOKENS, 2**24], ids=["1 a chunk", "5 a chunk", "all", "default"])
def chunk_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 6], ids=["exact", "padded"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "peaked"])
def test_value_and_gradients_are_those_of_log_softmax_in_fp64(chunk_logits: int, rows: int, scale: float) -> None:
    inputs = case(rows=rows, scale=scale)
    assert_rounding_alone(chunked(*inputs), *inputs)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "peaked"])
def test_what_is_written_out_is_what_autograd_finds(scale: float) -> None:
    """What the comparison is worth."""
    inputs = case(rows=VOCAB + 6, scale=scale)
    for found, expected in zip(rounded(*inputs), whole(*inputs), strict=True):
        torch.testing.assert_close(found.exact, expected[: len(found.exact)], rtol=1e-12, atol=1e-12)


def test_rows_that_pad_the_vocabulary_get_no_gradient_however_large_they_are() -> None:
    inputs = case(rows=VOCAB + 6)
    inputs[1][VOCAB:] = 100.0
    assert_rounding_alone(chunked(*inputs), *inputs)


@pytest.mark.parametrize(
    ("tokens_at_once", "products"), [(4, 6 + 5), (TOKENS, 1)], ids=["23 tokens, 4 a chunk", "one chunk"]
)
def test_logits_of_one_chunk_exist_at_a_time_and_the_last_are_made_once(
    tokens_at_once: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", tokens_at_once * VOCAB + 3)
    sizes, storages = [], set()
    real = logprobs.LogitProduct.__call__

    def recorded(product: logprobs.LogitProduct, hidden: Tensor, out: Tensor) -> Tensor:
        logits = real(product, hidden, out)
        sizes.append(logits.numel())
        storages.add(logits.untyped_storage().data_ptr())
        return logits

    monkeypatch.setattr(logprobs.LogitProduct, "__call__", recorded)
    chunked(*case())
    assert len(sizes) == products
    assert max(sizes) <= tokens_at_once * VOCAB
    assert len(storages) == 1


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels, grad = case()
    value = token_logprobs(hidden.requires_grad_(), weight, labels, VOCAB)
    value.backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward(grad)


def test_no_tokens_have_no_log_probs_and_zero_gradients() -> None:
    value, grad_hidden, grad_weight = chunked(*case(tokens=0))
    assert value.shape == (0,)
    assert grad_hidden.shape == (0, HIDDEN)
    assert grad_weight.shape == (VOCAB, HIDDEN)
    assert not grad_weight.any()


def test_large_logits_do_not_overflow() -> None:
    inputs = case(scale=3000.0)
    found = chunked(*inputs)
    assert all(tensor.isfinite().all() for tensor in found)
    assert_within(found[0], rounded(*inputs)[0])


def test_log_probs_of_bf16_inputs_are_fp32_and_gradients_off_by_the_rounding_of_bf16(chunk_logits: int) -> None:
    hidden, weight, labels, grad = case()
    inputs = hidden.bfloat16(), weight.bfloat16(), labels, grad
    found, expected = chunked(*inputs), whole(*inputs)
    assert_within(found[0], rounded(*inputs)[0])
    # Of the slopes, and of the gradients, which are sums of both signs.
    for gradient, truth in zip(found[1:], expected[1:], strict=True):
        assert distance(gradient, truth) < 10 * unit(torch.bfloat16)


def test_bf16_weight_gradients_are_rounded_once_however_many_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bf16, each chunk would lose what is below the last bit of the sum so far."""
    hidden, weight, labels, grad = case(tokens=2048)
    inputs = hidden.bfloat16(), weight.bfloat16(), labels, grad
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 16 * VOCAB)
    many = chunked(*inputs)[2].double()
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 2048 * VOCAB)
    one = chunked(*inputs)[2].double()
    # One rounding on either side, and what fp32 sums leave.
    assert distance(many, one) < 2 * unit(torch.bfloat16) + of_sum(2048)


def test_gradients_are_the_derivatives_of_the_value() -> None:
    """Central differences of the value itself, which is fp32: a step of 0.1 leaves an error of about 1e-4."""
    hidden, weight, labels, grad = case(tokens=5)
    _, grad_hidden, grad_weight = chunked(hidden, weight, labels, grad)
    draw = torch.Generator().manual_seed(1)
    for moved, gradient in ((hidden, grad_hidden), (weight, grad_weight)):
        direction = torch.randn(moved.shape, generator=draw)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            moved += sign * 0.05 * direction
            ends.append(float((token_logprobs(hidden, weight, labels, VOCAB).double() * grad).sum()))
            moved -= sign * 0.05 * direction
        slope = (ends[0] - ends[1]) / 0.1
        assert slope == pytest.approx(float((gradient * direction).sum()), abs=2e-3)


def _rank(rank: int, folder: str) -> None:
    for world, rows, group in shared_cases(rank, folder):
        hidden, weight, labels, grad = case(rows=rows * world)
        hidden.requires_grad_()
        share = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
        value = token_logprobs(hidden, share, labels, VOCAB, group)
        value.backward(grad)
        torch.save((value.detach(), hidden.grad, share.grad), f"{folder}/{world}-{rank}.pt")


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of three processes computes; they start once."""
    return run_ranks(_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world", "rows"), SHARED, ids=SHARED_IDS)
def test_vocabulary_parallel_log_probs_are_those_of_the_whole(world: int, rows: int, over_ranks: Path) -> None:
    ranks = [torch.load(over_ranks / f"{world}-{rank}.pt") for rank in range(world)]
    values, hidden_grads, weight_grads = zip(*ranks, strict=True)
    assert all(torch.equal(values[0], other) for other in values)
    assert_rounding_alone((values[0], sum(hidden_grads), torch.cat(weight_grads)), *case(rows=rows * world))
