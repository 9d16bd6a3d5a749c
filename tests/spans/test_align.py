"""What ``align`` promises of its result and of its errors."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import ByT5Tokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.spans import AlignedSpans, align, align_batch, token_byte_ends
from tests.spans.conftest import KNOWN
from tests.spans.oracle_match import as_lists

TEXTS = st.lists(st.sampled_from([*KNOWN, "  ", "\n\n", "🦙🦙", "e\u0301"]), max_size=20).map("".join)
PAIRS = [("byte level", "metaspace"), ("wordpiece", "nfkc"), ("byte fallback", "byte level with prefix")]


def test_field_types_are_those_of_the_contract(trained):
    spans = align("ab cd 🦙", trained["byte level"].tokenizer, trained["metaspace"].tokenizer)
    types = [spans.bounds.dtype, spans.teacher_ids.dtype, spans.student_ids.dtype]
    assert types == [np.int64] * 3
    assert [spans.teacher_span.dtype, spans.student_span.dtype] == [np.int32] * 2
    assert spans.n_spans == len(spans.bounds) - 1
    assert all(field.flags.writeable for field in (spans.bounds, spans.teacher_ids, spans.teacher_span))


def test_an_empty_text_has_no_spans_and_no_tokens(trained):
    for teacher in trained.values():
        for student in trained.values():
            assert as_lists(align("", teacher.tokenizer, student.tokenizer)) == [[0], [], [], [], []]
    assert align_batch([], trained["metaspace"].tokenizer, trained["metaspace"].tokenizer) == []


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_a_batch_gives_what_single_calls_give(trained, texts):
    for teacher, student in PAIRS:
        one, other = trained[teacher].tokenizer, trained[student].tokenizer
        assert [as_lists(spans) for spans in align_batch(texts, one, other)] == [
            as_lists(align(text, one, other)) for text in texts
        ]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_swapping_teacher_and_student_swaps_the_sides(trained, text):
    for teacher, student in PAIRS:
        there = align(text, trained[teacher].tokenizer, trained[student].tokenizer)
        back = align(text, trained[student].tokenizer, trained[teacher].tokenizer)
        swapped = (back.bounds, back.student_ids, back.teacher_ids, back.student_span, back.teacher_span)
        assert as_lists(there) == as_lists(AlignedSpans(*swapped))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_bounds_are_the_ends_that_both_sides_know(trained, text):
    for teacher, student in PAIRS:
        one, other = trained[teacher].tokenizer, trained[student].tokenizer
        known = [set(token_byte_ends(text, tokenizer)[1].tolist()) - {-1} for tokenizer in (one, other)]
        expected = (known[0] & known[1]) | {0, len(text.encode())}
        assert align(text, one, other).bounds.tolist() == sorted(expected)


def test_one_tokenizer_on_both_sides_gives_its_own_tokens_and_separate_arrays(trained):
    tokenizer = trained["byte level"].tokenizer
    spans = align("ab 🦙 cd", tokenizer, tokenizer)
    assert spans.teacher_span.tolist() == spans.student_span.tolist() == list(range(len(spans.teacher_ids)))
    assert not np.shares_memory(spans.teacher_ids, spans.student_ids)
    assert not np.shares_memory(spans.teacher_span, spans.student_span)


def test_spans_and_tokenizers_survive_the_way_to_a_worker(trained):
    one, other = trained["byte level"].tokenizer, trained["nfkc"].tokenizer
    spans = align("ab ﬁ 🦙", one, other)
    assert as_lists(pickle.loads(pickle.dumps(spans))) == as_lists(spans)
    sent_one, sent_other = pickle.loads(pickle.dumps((one, other)))
    assert as_lists(align("ab ﬁ 🦙", sent_one, sent_other)) == as_lists(spans)


def test_a_lone_surrogate_is_refused_with_its_place(trained):
    tokenizer = trained["metaspace"].tokenizer
    with pytest.raises(InputError, match=r"text 1, character 2: found a lone surrogate U\+D83E"):
        align_batch(["fine", "ab\ud83ecd"], tokenizer, tokenizer)


@pytest.mark.parametrize("texts", ["a string", [b"bytes"], [None]])
def test_anything_but_a_list_of_strings_is_refused(trained, texts):
    tokenizer = trained["metaspace"].tokenizer
    with pytest.raises(InputError, match="string"):
        align_batch(texts, tokenizer, tokenizer)


@pytest.mark.parametrize("tokenizer", [ByT5Tokenizer(), object(), None], ids=["slow", "object", "none"])
def test_a_tokenizer_that_is_not_a_fast_one_is_refused(trained, tokenizer):
    with pytest.raises(InputError, match="expected a Hugging Face fast tokenizer"):
        align("a", tokenizer, trained["metaspace"].tokenizer)


def test_a_tokenizer_with_parts_written_in_python_is_refused(trained):
    tokenizer = copy.deepcopy(trained["metaspace"].tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(InputError, match="parts that cannot be copied"):
        align("a", tokenizer, tokenizer)
