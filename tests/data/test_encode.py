"""Pairs become tokens on both sides, cut at the same span where they are too long."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, Skipped
from ctpd_nemo.data.forms import Message, PreferencePair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.spans import align


def encode(encoder: PairEncoder, pairs: list[PreferencePair]) -> list[EncodedPair | Skipped]:
    return encoder.encode(list(range(len(pairs))), pairs)


def responses(encoded: list[EncodedPair | Skipped], pairs: list[PreferencePair]) -> list[tuple[str, EncodedResponse]]:
    """The text and the encoding of every response that is not skipped."""
    found = []
    for pair, result in zip(pairs, encoded, strict=True):
        if isinstance(result, EncodedPair):
            found += [(pair.chosen, result.chosen), (pair.rejected, result.rejected)]
    return found


def expected_response(
    encoder: PairEncoder, text: str, policy_prompt: int, reference_prompt: int
) -> tuple[list[list[int]], list[list[int]], int, bool]:
    """Ids and spans of both sides, number of spans, and whether it was cut: by trying every cut from the longest."""
    policy, reference = encoder.policy, encoder.reference
    spans = align(text, reference.tokenizer, policy.tokenizer)
    sides = [
        (spans.student_ids, spans.student_span, policy.end_of_turn_ids, policy_prompt),
        (spans.teacher_ids, spans.teacher_span, reference.end_of_turn_ids, reference_prompt),
    ]
    cuts = [(spans.n_spans, encoder.include_eos)] + [(n, False) for n in range(spans.n_spans, 0, -1)]
    for number, (n_spans, with_end) in enumerate(cuts):
        ids, numbers, fits = [], [], True
        for side_ids, side_span, end, prompt in sides:
            kept = side_span < n_spans
            ids.append(side_ids[kept].tolist() + (end.tolist() if with_end else []))
            numbers.append(side_span[kept].tolist() + [n_spans] * (len(ids[-1]) - int(kept.sum())))
            fits &= prompt + len(ids[-1]) <= encoder.max_length
        if fits:
            return ids, numbers, n_spans + with_end, number > 0
    return [[], []], [[], []], 0, True


@pytest.mark.parametrize("max_length", [24, 40, 64, 1000])
@pytest.mark.parametrize("include_eos", [True, False])
def test_both_sides_are_cut_at_the_last_span_that_fits(
    max_length: int,
    include_eos: bool,
    unigram_side: Side,
    bpe_side: Side,
    make_pairs: Callable[..., list[PreferencePair]],
) -> None:
    encoder = PairEncoder(unigram_side, bpe_side, include_eos, max_length)
    pairs = make_pairs(60, seed=max_length)
    cut = skipped = 0
    for pair, result in zip(pairs, encode(encoder, pairs), strict=True):
        prompts = [len(side.render_prompt(pair.prompt)) for side in (unigram_side, bpe_side)]
        expected = [expected_response(encoder, text, *prompts) for text in (pair.chosen, pair.rejected)]
        if isinstance(result, Skipped):
            skipped += 1
            n_spans = [n for _, _, n, _ in expected]
            same = expected[0][0][0] == expected[1][0][0]
            assert result.reason == ("too_long" if 0 in n_spans else "equal_after_truncation")
            assert 0 in n_spans or same
            continue
        for response, (ids, spans, n_spans, truncated) in zip((result.chosen, result.rejected), expected, strict=True):
            assert [response.policy.response_ids.tolist(), response.reference.response_ids.tolist()] == ids
            assert [response.policy.response_span.tolist(), response.reference.response_span.tolist()] == spans
            assert (response.n_spans, response.truncated) == (n_spans, truncated)
            assert len(response.bounds) - 1 == n_spans - (include_eos and not truncated)
            cut += truncated
    # The limits were chosen so that all of it is seen.
    assert (cut > 0) == (skipped > 0) == (max_length < 1000)


def test_the_end_of_turn_is_one_last_span_of_its_own(encoder: PairEncoder) -> None:
    (pair,) = encode(encoder, [PreferencePair("a", (Message("user", "x"),), "the sea", "the sky", "")])
    assert isinstance(pair, EncodedPair)
    for side, tokens in ((encoder.policy, pair.chosen.policy), (encoder.reference, pair.chosen.reference)):
        assert tokens.response_ids[-1:].tolist() == side.end_of_turn_ids.tolist()
        assert tokens.response_span.tolist().count(pair.chosen.n_spans - 1) == 1
        assert tokens.response_ids.dtype == tokens.response_span.dtype == np.int32


def test_a_response_that_ends_its_own_turn_does_not_end_it_twice(real_side: Callable[[str], Side]) -> None:
    encoder = PairEncoder(real_side("llama3"), real_side("qwen2"), True, 512)
    text = "Stop <|eot_id|><|im_end|></s>"
    (pair,) = encode(encoder, [PreferencePair("a", (Message("user", text),), text, "x" + text, "")])
    assert isinstance(pair, EncodedPair)
    for side, tokens in ((encoder.policy, pair.chosen.policy), (encoder.reference, pair.chosen.reference)):
        special = [index for index in tokens.response_ids.tolist() if index in side.tokenizer.added_tokens_decoder]
        assert special == side.end_of_turn_ids.tolist()
        assert side.tokenizer.decode(tokens.response_ids[:-1]) == text


def test_one_side_alone_is_tokenized_once(unigram_side: Side, make_pairs: Callable[..., list[PreferencePair]]) -> None:
    pairs = make_pairs(20)
    alone = encode(PairEncoder(unigram_side, None, True, 512), pairs)
    beside_itself = encode(PairEncoder(unigram_side, Side(unigram_side.tokenizer), True, 512), pairs)
    for encoded in (alone, beside_itself):
        for text, response in responses(encoded, pairs):
            assert response.reference is response.policy
            # Without another tokenizer a span is a token, but for the dummy space in front and cut characters.
            assert response.policy.response_ids[:-1].tolist() == unigram_side.tokenizer.encode(
                text, add_special_tokens=False
            )
            assert response.n_spans == response.policy.response_span[-1] + 1


def test_one_tokenizer_with_two_templates_differs_in_the_prompt_alone(
    bpe_side: Side, make_pairs: Callable[..., list[PreferencePair]]
) -> None:
    other = Side(bpe_side.tokenizer, "Answer: " + bpe_side.chat_template)
    (pair,) = encode(PairEncoder(bpe_side, other, True, 512), make_pairs(1))
    assert isinstance(pair, EncodedPair)
    assert len(pair.chosen.reference.prompt_ids) > len(pair.chosen.policy.prompt_ids)
    assert pair.chosen.reference.response_ids.tolist() == pair.chosen.policy.response_ids.tolist()


def test_pairs_that_cannot_be_used_are_named_with_a_reason(bpe_side: Side) -> None:
    def pair(name: str, prompt: str, chosen: str, rejected: str) -> PreferencePair:
        return PreferencePair(name, (Message("user", prompt),), chosen, rejected, "")

    pairs = [
        pair("fits", "sea", "a", "b"),
        pair("no room", "sea " * 60, "a", "b"),
        pair("long prompt", "sea " * 25, "a", "b"),
        pair("equal start", "sea", "a river " * 50 + "a", "a river " * 50 + "b"),
    ]
    encoded = PairEncoder(bpe_side, None, True, 64, max_prompt_length=40).encode([5, 6, 7, 8], pairs)
    assert isinstance(encoded[0], EncodedPair)
    assert (encoded[0].index, encoded[0].id) == (5, "fits")
    assert encoded[1:] == [
        Skipped(6, "no room", "prompt_too_long"),
        Skipped(7, "long prompt", "prompt_too_long"),
        Skipped(8, "equal start", "equal_after_truncation"),
    ]
    unlimited = PairEncoder(bpe_side, None, True, 64).encode([5, 6, 7, 8], pairs)
    assert [result.reason for result in unlimited if isinstance(result, Skipped)] == [
        "too_long",
        "equal_after_truncation",
    ]


def test_a_prompt_that_a_template_refuses_stops_with_its_place(bpe_side: Side) -> None:
    refuse = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    side = Side(bpe_side.tokenizer, refuse + "{{ m.content }}{% endfor %}")
    prompt = (Message("system", "a"), Message("user", "b"))
    with pytest.raises(
        InputError, match=r"^pairs\.jsonl:17, tokenizer .*fails on the roles system, user \(no system role"
    ):
        encode(PairEncoder(side, None, True, 64), [PreferencePair("a", prompt, "a", "b", "pairs.jsonl:17")])


def test_texts_that_normalization_makes_equal_are_named(real_side: Callable[[str], Side]) -> None:
    pair = PreferencePair("nfc", (Message("user", "x"),), "caf\u00e9", "cafe\u0301", "")
    assert encode(PairEncoder(real_side("qwen2"), None, True, 64), [pair]) == [Skipped(0, "nfc", "equal_tokens")]


def test_a_batch_encodes_like_its_pairs_alone(
    encoder: PairEncoder, make_pairs: Callable[..., list[PreferencePair]]
) -> None:
    pairs = make_pairs(20)
    together = encode(encoder, pairs)
    for number, pair in enumerate(pairs):
        (alone,) = encode(encoder, [pair])
        assert repr(replace(alone, index=number)) == repr(together[number])
    assert encode(encoder, []) == []


@pytest.mark.parametrize("limits", [{"max_length": 0}, {"max_length": 8, "max_prompt_length": 0}])
def test_limits_must_be_positive(limits: dict[str, int], bpe_side: Side) -> None:
    with pytest.raises(InputError, match=r"data\.max_(prompt_)?length: found 0"):
        PairEncoder(bpe_side, None, True, **limits)


def test_real_pairs_keep_their_text_on_both_sides(shared_dir: object, real_side: Callable[[str], Side]) -> None:
    encoder = PairEncoder(real_side("llama3"), real_side("qwen2"), True, 4096)
    pairs = open_preferences(f"{shared_dir}/preferences/test.jsonl")[:60]
    found = responses(encode(encoder, pairs), pairs)
    assert len(found) == 2 * len(pairs)
    for text, response in found:
        assert not response.truncated
        assert response.bounds[-1] == len(text.encode())
        assert encoder.policy.tokenizer.decode(response.policy.response_ids[:-1]) == text
        assert encoder.reference.tokenizer.decode(response.reference.response_ids[:-1]) == text
