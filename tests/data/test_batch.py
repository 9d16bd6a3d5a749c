"""The buffers of a microbatch, against a construction token by token."""

import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.data.batch import Microbatch, build_microbatch
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.errors import InputError

BOTH = ("chosen", "rejected")
FIELDS = [field.name for field in dataclasses.fields(Microbatch) if field.name != "max_seqlen"]


@pytest.fixture(scope="module")
def pairs(encoder: PairEncoder, make_pairs: Callable[..., list[PreferencePair]]) -> list[EncodedPair]:
    made = make_pairs(9, seed=3)
    encoded = encoder.encode([10 * number for number in range(9)], made)
    return [pair for pair in encoded if isinstance(pair, EncodedPair)][:6]


class Scores:
    """Scores that name their span: 1000 * row + number for chosen, negative for rejected; weights are a tenth."""

    def __init__(self, pairs: list[EncodedPair], missing: int = 0) -> None:
        self.pairs = {pair.id: pair for pair in pairs}
        self.missing = missing

    def lookup(self, pair: EncodedPair) -> tuple[Any, ...]:
        pair = self.pairs[pair.id]
        chosen = pair.index * 1000 + np.arange(pair.chosen.n_spans, dtype=np.float32)
        rejected = -(pair.index * 1000 + np.arange(pair.rejected.n_spans - self.missing, dtype=np.float32))
        return chosen, rejected, chosen / 10, rejected / 10


def token_by_token(
    pairs: list[EncodedPair], side: str, responses: tuple[str, ...], width: Callable[[list[int], int], int]
) -> dict[str, list[float]]:
    """All buffers but the scores; ``width(lengths, s)`` is the padded length of sequence s."""
    out: dict[str, list[float]] = {name: [] for name in FIELDS}
    out["cu_seqlens"].append(0)
    sequences = [(pair, name, getattr(getattr(pair, name), side)) for pair in pairs for name in responses]
    lengths = [len(tokens.prompt_ids) + len(tokens.response_ids) for _, _, tokens in sequences]
    for number, (pair, name, tokens) in enumerate(sequences):
        prompt, response = tokens.prompt_ids.tolist(), tokens.response_ids.tolist()
        spans_before = len(out["span_response"])
        for position in range(width(lengths, number)):
            in_text = position < len(prompt) + len(response)
            out["tokens"].append((prompt + response)[position] if in_text else 99)
            out["position_ids"].append(position)
            follows = position + 1 - len(prompt)
            is_response = 0 <= follows < len(response)
            out["labels"].append(response[follows] if is_response else -1)
            out["span_ids"].append(spans_before + tokens.response_span.tolist()[follows] if is_response else -1)
        out["cu_seqlens"].append(len(out["tokens"]))
        out["span_response"] += [number] * getattr(pair, name).n_spans
        out[name].append(number)
    out["pair_index"] = [pair.index for pair in pairs]
    return out


@pytest.mark.parametrize(("multiple", "sequence_multiple"), [(1, 1), (16, 1), (1, 4), (6, 4)])
@pytest.mark.parametrize("padding", ["packed", "padded"])
@pytest.mark.parametrize("side", ["policy", "reference"])
@pytest.mark.parametrize("responses", [BOTH, ("chosen",)])
def test_buffers_equal_a_construction_token_by_token(
    multiple: int, sequence_multiple: int, padding: Any, side: Any, responses: Any, pairs: list[EncodedPair]
) -> None:
    both = math.lcm(multiple, sequence_multiple)

    def width(lengths: list[int], number: int) -> int:
        if padding == "padded":
            return -(-max(lengths) // both) * both
        each = [length + -length % sequence_multiple for length in lengths]
        return each[number] + (-sum(each) % both if number == len(lengths) - 1 else 0)

    expected = token_by_token(pairs, side, responses, width)
    built = build_microbatch(
        pairs,
        pad_token_id=99,
        side=side,
        responses=responses,
        pad_to_multiple=multiple,
        sequence_multiple=sequence_multiple,
        padding=padding,
    )
    for name in FIELDS:
        if name not in ("span_weights", "reference_logprobs"):
            assert getattr(built, name).tolist() == expected[name], name
    assert built.span_weights.tolist() == [1.0] * built.num_spans
    assert built.reference_logprobs.tolist() == [0.0] * built.num_spans
    assert built.num_tokens == len(expected["tokens"])
    assert built.num_tokens % both == 0
    assert built.num_pairs == len(pairs)
    assert built.num_responses == len(pairs) * len(responses)
    assert built.max_seqlen == max(np.diff(expected["cu_seqlens"]))
    int32 = {"span_ids", "cu_seqlens", "span_response", "chosen", "rejected"}
    for name in FIELDS:
        floats = name in ("span_weights", "reference_logprobs")
        dtype = torch.float32 if floats else torch.int32 if name in int32 else torch.int64
        assert getattr(built, name).dtype == dtype


def made_pair(index: int, lengths: list[tuple[int, int]]) -> EncodedPair:
    """A pair of tokens 1, 2, 3, ...; ``lengths`` are of prompt and response, chosen and rejected."""

    def response(n_prompt: int, n_response: int) -> EncodedResponse:
        ids = np.arange(1, n_prompt + n_response + 1, dtype=np.int32)
        tokens = SideTokens(ids[:n_prompt], ids[n_prompt:], np.arange(n_response, dtype=np.int32))
        return EncodedResponse(tokens, tokens, np.arange(n_response + 1), n_response, False)

    return EncodedPair(index, f"made-{index}", *(response(*pair) for pair in lengths))


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5),
    st.sampled_from([1, 2, 8, 12]),
    st.sampled_from([1, 2, 4, 16]),
    st.sampled_from(["packed", "padded"]),
)
def test_padding_belongs_to_its_sequence_and_to_no_loss(
    lengths: list[Any], multiple: int, sequence_multiple: int, padding: str
) -> None:
    pairs = [made_pair(number, list(pair)) for number, pair in enumerate(lengths)]
    built = build_microbatch(
        pairs, pad_token_id=0, pad_to_multiple=multiple, sequence_multiple=sequence_multiple, padding=padding
    )
    widths = np.diff(built.cu_seqlens)
    assert (widths % sequence_multiple == 0).all()
    assert built.num_tokens % multiple == 0
    for (begin, end), (n_prompt, n_response) in zip(
        zip(built.cu_seqlens[:-1].tolist(), built.cu_seqlens[1:].tolist(), strict=True),
        [size for pair in lengths for size in pair],
        strict=True,
    ):
        length = n_prompt + n_response
        filled = torch.arange(1, end - begin + 1)
        filled[length:] = 0
        assert built.tokens[begin:end].equal(filled)
        assert built.position_ids[begin:end].equal(torch.arange(end - begin))
        assert (built.labels[begin:end] >= 0).nonzero().flatten().tolist() == list(range(n_prompt - 1, length - 1))
    if padding == "packed":
        each = [-(-sum(size) // sequence_multiple) * sequence_multiple for pair in lengths for size in pair]
        assert widths[:-1].tolist() == each[:-1]
        assert widths[-1] - each[-1] < math.lcm(multiple, sequence_multiple)


def test_padded_and_packed_hold_the_same_labels_and_spans(pairs: list[EncodedPair]) -> None:
    packed = build_microbatch(pairs, pad_token_id=0)
    padded = build_microbatch(pairs, pad_token_id=0, padding="padded", pad_to_multiple=8)
    assert padded.num_tokens > packed.num_tokens
    for one, other in ((packed.labels, padded.labels), (packed.span_ids, padded.span_ids)):
        assert one[one >= 0].tolist() == other[other >= 0].tolist()
    assert packed.span_response.equal(padded.span_response)


def test_a_pad_id_that_is_a_real_token_drops_nothing(pairs: list[EncodedPair]) -> None:
    first = int(pairs[0].chosen.policy.response_ids[0])
    one = build_microbatch(pairs, pad_token_id=first, padding="padded")
    other = build_microbatch(pairs, pad_token_id=0, padding="padded")
    assert one.labels.equal(other.labels)
    assert one.span_ids.equal(other.span_ids)


def test_both_sides_number_spans_and_pairs_alike(pairs: list[EncodedPair]) -> None:
    policy, reference = (build_microbatch(pairs, pad_token_id=0, side=side) for side in ("policy", "reference"))
    assert policy.num_tokens != reference.num_tokens
    for name in ("span_response", "chosen", "rejected", "pair_index"):
        assert getattr(policy, name).equal(getattr(reference, name))
    for built in (policy, reference):
        assert sorted(set(built.span_ids[built.span_ids >= 0].tolist())) == list(range(built.num_spans))


def test_scores_stand_at_their_spans(pairs: list[EncodedPair]) -> None:
    built = build_microbatch(pairs, pad_token_id=0, scores=Scores(pairs))
    for number, pair in enumerate(pairs):
        for sign, response, n_spans in (
            (1, built.chosen[number], pair.chosen.n_spans),
            (-1, built.rejected[number], pair.rejected.n_spans),
        ):
            own = built.span_response == response
            expected = sign * (1000.0 * pair.index + torch.arange(n_spans))
            assert built.reference_logprobs[own].tolist() == expected.tolist()
            assert built.span_weights[own].tolist() == (expected / 10).tolist()
    chosen = build_microbatch(pairs, pad_token_id=0, scores=Scores(pairs), responses=("chosen",))
    assert chosen.reference_logprobs.min() == 0


def test_scores_of_another_number_of_spans_are_refused(pairs: list[EncodedPair]) -> None:
    n_spans = pairs[0].rejected.n_spans
    with pytest.raises(InputError) as stopped:
        build_microbatch(pairs, pad_token_id=0, scores=Scores(pairs, missing=1))
    assert str(stopped.value) == (
        f"scores of pair {pairs[0].id!r}: found {n_spans - 1} reference log-probs and {n_spans - 1} weights of the "
        f"rejected response; expected {n_spans} of each, one a span"
    )


def test_a_microbatch_is_sent_as_three_buffers(pairs: list[EncodedPair]) -> None:
    built = build_microbatch(pairs, pad_token_id=0, scores=Scores(pairs))
    storages = {getattr(built, name).untyped_storage().data_ptr() for name in FIELDS}
    assert len(storages) == 3
    for copy in (pickle.loads(pickle.dumps(built)), built.to("cpu"), torch.load(saved(built), weights_only=False)):
        for name in FIELDS:
            assert getattr(copy, name).equal(getattr(built, name)), name
        assert copy.max_seqlen == built.max_seqlen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_microbatch_moves_whole(pairs: list[EncodedPair]) -> None:
    built = build_microbatch(pairs, pad_token_id=0)
    pinned = built.pin_memory()
    moved = pinned.to("cuda")
    torch.cuda.synchronize()
    for name in FIELDS:
        assert getattr(pinned, name).is_pinned()
        assert getattr(moved, name).is_cuda
        assert getattr(moved, name).cpu().equal(getattr(built, name)), name


def saved(microbatch: Microbatch) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(microbatch, file)
    file.seek(0)
    return file


def test_a_filler_has_tokens_and_nothing_else() -> None:
    filler = Microbatch.filler(16, pad_token_id=7)
    assert filler.tokens.tolist() == [7] * 16
    assert filler.position_ids.tolist() == list(range(16))
    assert set(filler.labels.tolist()) == set(filler.span_ids.tolist()) == {-1}
    assert filler.cu_seqlens.tolist() == [0, 16]
    assert (filler.num_tokens, filler.num_pairs, filler.num_responses, filler.num_spans) == (16, 0, 0, 0)
    assert filler.max_seqlen == 16


def test_wrong_dtypes_and_empty_batches_are_errors(pairs: list[EncodedPair]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        build_microbatch([], pad_token_id=0)
    with pytest.raises(ValueError, match="padding is 'none'"):
        build_microbatch(pairs, pad_token_id=0, padding="none")
    built = build_microbatch(pairs, pad_token_id=0)
    fields = {name: getattr(built, name) for name in FIELDS}
    with pytest.raises(TypeError, match=r"labels is torch\.int32, not torch\.int64"):
        Microbatch(**{**fields, "labels": built.labels.int()}, max_seqlen=1)
