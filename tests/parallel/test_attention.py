"""Packed attention against softmax attention written out, one sequence and one head at a time, in fp64."""

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from ctpd_nemo.parallel.attention import PackedAttention
from tests.rounding import Rounded, assert_within

HEAD_DIM = 8


def attention(
    heads: int, groups: int, window: int | None = None, softmax_scale: float | None = None
) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_query_groups=groups,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
    )
    return PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def case(lengths: list[int], heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor, PackedSeqParams]:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), n, HEAD_DIM, generator=draw) for n in (heads, groups, groups))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    return query, key, value, packed


def written_out(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float
) -> Tensor:
    out, start = torch.empty_like(query), 0
    repeat = query.shape[1] // key.shape[1]
    for length in lengths:
        for head in range(query.shape[1]):
            for at in range(start, start + length):
                first = start if window is None else max(start, at - window + 1)
                scores = key[first : at + 1, head // repeat] @ query[at, head] * scale
                out[at, head] = torch.softmax(scores, 0) @ value[first : at + 1, head // repeat]
        start += length
    return out.flatten(1)


def rounded(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float, grad: Tensor
) -> list[Rounded]:
    """The output and the gradients of query, key and value, in closed form, with how far rounding may move them."""
    repeat = query.shape[1] // key.shape[1]
    parts: list[list[Rounded]] = [[], [], [], []]
    for run, slope in zip(
        zip(*(x.split(lengths) for x in (query, key, value)), strict=True), grad.split(lengths), strict=True
    ):
        q, k, v = (Rounded.given(x.transpose(0, 1)) for x in run)
        k, v = (x.repeat_interleave(repeat, 0) for x in (k, v))
        out_slope = Rounded.given(slope.unflatten(1, query.shape[1:]).transpose(0, 1))
        scores = q @ k.transpose(1, 2) * scale
        distance = torch.arange(len(slope))[:, None] - torch.arange(len(slope))
        hidden = (distance < 0) | (distance >= (window or len(slope)))
        probs = Rounded(scores.exact.masked_fill(hidden, -torch.inf), scores.error, scores.unit).softmax()
        of_probs = out_slope @ v.transpose(1, 2)
        of_scores = probs * (of_probs - (probs * of_probs).sum(keepdim=True)) * scale
        of_key, of_value = of_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ out_slope
        # Of all queries that read a key and a value.
        of_key, of_value = (x.unflatten(0, (-1, repeat)).sum(1) for x in (of_key, of_value))
        for made, part in zip(parts, (probs @ v, of_scores @ k, of_key, of_value), strict=True):
            made.append(part.transpose(0, 1))
    return [
        Rounded(torch.cat([x.exact for x in made]), torch.cat([x.error for x in made]), made[0].unit) for made in parts
    ]


@pytest.mark.parametrize("lengths", [[7], [1], [3, 1, 9, 2], [1, 1, 1], [5, 5]], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_output_and_gradients_are_those_of_attention_written_out(
    lengths: list[int], heads: int, groups: int, window: int | None
) -> None:
    *qkv, packed = case(lengths, heads, groups)
    inputs = [x.clone().requires_grad_() for x in qkv]
    found = attention(heads, groups, window)(*inputs, None, packed_seq_params=packed)
    assert found.shape == (sum(lengths), heads * HEAD_DIM)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(grad)
    output, *gradients = rounded(*qkv, lengths, window, HEAD_DIM**-0.5, grad)
    assert_within(found, output.flatten(1))
    for x, expected in zip(inputs, gradients, strict=True):
        # Of one key each the softmax is one, whatever the scores: nothing but rounding is left of their gradients.
        assert_within(x.grad, expected, is_zero=not expected.exact.any())
    exact = [x.double().requires_grad_() for x in qkv]
    plain = written_out(*exact, lengths, window, HEAD_DIM**-0.5)
    plain.backward(grad.double())
    for here, there in zip((output.flatten(1), *gradients), (plain, *(x.grad for x in exact)), strict=True):
        torch.testing.assert_close(here.exact, there.detach(), rtol=1e-12, atol=1e-12)


def test_softmax_scale_can_be_given() -> None:
    *qkv, packed = case([4, 3], 2, 1)
    found = attention(2, 1, softmax_scale=0.7)(*qkv, None, packed_seq_params=packed)
    assert_within(found, rounded(*qkv, [4, 3], None, 0.7, torch.zeros_like(found))[0].flatten(1))


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    query, key, value, packed = case([4, 6, 3], 4, 2)
    middle = rounded(query[4:10], key[4:10], value[4:10], [6], None, HEAD_DIM**-0.5, torch.zeros(6, 32))[0].flatten(1)
    for x in (query, key, value):
        x[:4], x[10:] = 1e4, torch.nan
    assert_within(attention(4, 2)(query, key, value, None, packed_seq_params=packed)[4:10], middle)


def test_attention_dropout_is_refused() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout"):
        PackedAttention(config, 1, AttnMaskType.causal, "self")
