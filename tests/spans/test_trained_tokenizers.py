"""Alignment against the oracle with tokenizers of every kind, trained in the test."""

import itertools

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctpd_nemo.spans import align, align_batch, token_byte_ends
from tests.spans import oracle
from tests.spans.conftest import KNOWN, Hand, prefixed_letters
from tests.spans.oracle_match import assert_covers, assert_every_ordered_pair_matches

TEXTS = st.lists(st.sampled_from([*KNOWN, "  ", "\n\n", "🦙🦙", "ﬁ ﬁ", "한한", "ab"]), max_size=30).map("".join)


@settings(max_examples=120, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="🦙 a")
@example(text="ﬁﬁ①")
@example(text="\n a \n")
def test_spans_match_the_oracle_for_every_kind_of_tokenizer(trained, text):
    assume(not text.isspace())  # WordPiece has no token for such a text: the next test
    assert_every_ordered_pair_matches([text], trained)


@pytest.mark.parametrize("text", [" ", "  \n", "\u200b \u0300"])
def test_a_text_without_tokens_on_one_side_is_one_span(trained, text):
    word_piece, byte_level = trained["wordpiece"].tokenizer, trained["byte level"].tokenizer
    spans = align(text, word_piece, byte_level)
    assert spans.bounds.tolist() == [0, len(text.encode())]
    assert spans.teacher_ids.tolist() == spans.teacher_span.tolist() == []
    assert spans.student_span.tolist() == [0] * len(spans.student_ids)
    assert len(spans.student_ids) > 0


def test_text_that_no_token_covers_belongs_to_the_token_that_follows(trained):
    ids, ends = token_byte_ends(" a  b ", trained["wordpiece"].tokenizer)
    assert trained["wordpiece"].tokenizer.convert_ids_to_tokens(ids.tolist()) == ["a", "b"]
    assert ends.tolist() == [2, 6]


def test_an_unknown_token_is_cut_at_characters_only(trained):
    text = "a \u4e00\u4e01b"
    ids, ends = token_byte_ends(text, trained["metaspace"].tokenizer)
    assert trained["metaspace"].tokenizer.unk_token_id in ids
    starts_of_characters = [len(text[:index].encode()) for index in range(1, len(text) + 1)]
    assert set(ends.tolist()) <= {*starts_of_characters, -1}
    assert ends[-1] == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_any_text_is_covered_in_order_by_every_pair(trained, texts):
    """Unknown characters, noncharacters, controls: the shape of the result holds even where the oracle cannot read."""
    for teacher, student in itertools.product(trained.values(), repeat=2):
        for text, spans in zip(texts, align_batch(texts, teacher.tokenizer, student.tokenizer), strict=True):
            assert_covers(text, spans)


def test_a_dummy_prefix_that_is_unknown_itself_closes_with_what_follows():
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    spans = align_batch(["b", "ab", "ab"], letters, letters)[1]
    assert spans.teacher_ids.tolist() == [0, 1, 2]
    assert spans.teacher_span.tolist() == [0, 0, 1]
    assert spans.bounds.tolist() == [0, 1, 2]


def test_byte_level_tokenizer_that_drops_bytes_is_cut_behind_the_bytes_it_kept():
    """A vocabulary without an initial alphabet has no token for bytes it never saw, and skips them in silence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(["ab 🦙 ab 🦙"], trainers.BpeTrainer(vocab_size=20, show_progress=False))
    hand = Hand(PreTrainedTokenizerFast(tokenizer_object=tokenizer), prefixed_letters, oracle.byte_level_pieces)
    assert {*"é漢".encode()} <= hand.missing
    assert_every_ordered_pair_matches(["éab 🦙é", "a漢🦙b", "ab 🦙", "🦙 é 🦙", "aéb"], {"gaps": hand})


def test_text_behind_a_silently_skipped_letter_is_not_cut():
    """Offsets behind a skipped letter are wrong (`b` of `axb` is said to come from `x`), so no end there is known."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert letters("axb", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2)]
    assert token_byte_ends("axb", letters)[1].tolist() == [-1, 3]
    assert token_byte_ends("a  b ", letters)[1].tolist() == [1, 5]
