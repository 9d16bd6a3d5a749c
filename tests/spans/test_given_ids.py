"""Spans of sampled ids against a brute-force reading of their bytes, with real tokenizers and small trained ones."""

import itertools
import random
from bisect import bisect_left
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.errors import InputError
from ctpd_nemo.spans import align, align_ids, align_ids_batch
from tests.fuzz import fuzz
from tests.spans import oracle
from tests.spans.oracle_match import as_lists
from tests.spans.test_real_tokenizers import SAMPLES

# Kinds of the trained tokenizers whose ids do not spell their text, or that fold it before it is tokenized again.
UNSPELLED = {"wordpiece"}


@cache
def text_ids(hand) -> frozenset[int]:
    """The ids that stand for text: neither special nor without a piece."""
    tokenizer = hand.tokenizer
    special = {*tokenizer.all_special_ids, *(k for k, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return frozenset(tokenizer.get_vocab().values()) - special


def known_pieces(hand, ids: list[int]) -> list[bytes]:
    """The bytes of each id up to the first that is no text."""
    return hand.pieces(hand.tokenizer, list(itertools.takewhile(text_ids(hand).__contains__, ids)))


def expected(ids: list[int], teacher, student) -> list[list[int]]:
    """One byte after the other: where both sides end a token, up to the last such place."""
    pieces = [piece.replace(oracle.META.encode(), b" ") if b"\xe2\x96\x81" in piece and student.pieces is not
              oracle.byte_level_pieces else piece for piece in known_pieces(student, ids)]  # fmt: skip
    data = b"".join(pieces)
    has_dummy = student.letters("x")[0].source is None and student.pieces is not oracle.byte_level_pieces
    dummy = has_dummy and data.startswith(b" ")
    data = data[dummy:]
    valid = next(n for n in range(len(data), -1, -1) if _is_text(data[:n]))
    text = data[:valid].decode()
    ends = [end - dummy for end in itertools.accumulate(map(len, pieces))]
    other = teacher.side(text)
    common = {end for end in ends if 0 < end <= valid} & ({*other.ends, valid} - {None})
    bounds = [0, *sorted(common)]

    def spans(known_ends: list[int | None]) -> list[int]:
        found, following = [], None
        for end in reversed(known_ends):
            following = end if end else following
            inside = following is not None and following <= bounds[-1]
            found.append(bisect_left(bounds, following) - 1 if inside else -1)
        return found[::-1]

    teacher_span = [span for span in spans(other.ends) if span >= 0] if text else []
    student_span = spans(ends)
    student_span += [-1] * (len(ids) - len(student_span))
    return [bounds, other.ids[: len(teacher_span)], list(ids), teacher_span, student_span]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def assert_matches(rows: list[list[int]], teacher, student, names) -> None:
    found = align_ids_batch(rows, teacher.tokenizer, student.tokenizer)
    for ids, spans in zip(rows, found, strict=True):
        assert as_lists(spans) == expected(ids, teacher, student), (names, ids)


@cache
def vocabulary_of(hand) -> dict[str, int]:
    return hand.tokenizer.get_vocab()


def cut_otherwise(hand, ids: list[int], rng: random.Random) -> list[int]:
    """Other ids of the same bytes: tokens taken apart into two that the vocabulary has, here and there."""
    vocabulary = vocabulary_of(hand)
    found: list[int] = []
    for index in ids:
        piece = hand.tokenizer.convert_ids_to_tokens(index)
        cuts = [n for n in range(1, len(piece)) if piece[:n] in vocabulary and piece[n:] in vocabulary]
        if cuts and rng.random() < 0.6:
            n = rng.choice(cuts)
            found += [vocabulary[piece[:n]], vocabulary[piece[n:]]]
        else:
            found.append(index)
    return found


def sampled_rows(hand, rng: random.Random) -> list[list[int]]:
    """What a model might sample: text in its own ids and in others, cut anywhere, special tokens and any id at all."""
    own = [hand.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in SAMPLES]
    other = [cut_otherwise(hand, ids, rng) for ids in own]
    cut = [ids[: rng.randrange(len(ids))] for ids in own + other if len(ids) > 1]
    size = max(vocabulary_of(hand).values()) + 1
    anything = [[rng.randrange(size) for _ in range(rng.randrange(12))] for _ in range(20)]
    special = list(hand.tokenizer.added_tokens_decoder) or [0]
    mixed = [[*ids[:3], rng.choice(special), *ids[3:]] for ids in other]
    beyond = [[*ids[:2], size + 7, *ids[2:]] for ids in own[:4]]
    return [*own, *other, *cut, *anything, *mixed, *beyond]


def test_sampled_ids_match_a_brute_force_reading_of_their_bytes(real):
    for student in real:
        rows = sampled_rows(real[student], random.Random(student))
        for teacher in real:
            assert_matches(rows, real[teacher], real[student], (teacher, student))


def test_sampled_ids_of_every_kind_of_tokenizer_match_a_brute_force_reading(trained):
    texts = ["", "abc ABC", "漢字हि한🦙", " a  b\n", "ab🦙", "İßfoo,'012"]
    for teacher, student in itertools.product(trained, set(trained) - UNSPELLED):
        hand, rng = trained[student], random.Random(0)
        own = [hand.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [ids[:n] for ids in own for n in range(len(ids) + 1)]
        rows += [cut_otherwise(hand, ids, rng) for ids in own]
        rows += [[rng.randrange(len(hand.tokenizer)) for _ in range(8)] for _ in range(30)]
        # The oracle reads texts that the teacher knows; WordPiece has no token for spaces alone.
        known = [ids for ids in rows if _teacher_reads(ids, trained[teacher], hand)]
        assert len(known) > len(rows) // 4
        assert_matches(known, trained[teacher], hand, (teacher, student))


def _teacher_reads(ids: list[int], teacher, student) -> bool:
    try:
        expected(ids, teacher, student)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_of_a_text_give_the_spans_of_that_text(real, text):
    for teacher, student in itertools.product(real.values(), repeat=2):
        if teacher is student:
            continue  # there alignment tokenizes once, and spans are the shortest that end on a known byte
        spans = align(text, teacher.tokenizer, student.tokenizer)
        again = align_ids(spans.student_ids, teacher.tokenizer, student.tokenizer)
        spelled = b"".join(known_pieces(student, spans.student_ids.tolist())).replace(oracle.META.encode(), b" ")
        if spelled in (text.encode(), b" " + text.encode()):
            assert as_lists(again) == as_lists(spans), (text, teacher.tokenizer, student.tokenizer)


@fuzz(25)
@given(data=st.data())
def test_any_ids_are_kept_and_spans_cover_their_text(real, data):
    student = data.draw(st.sampled_from(sorted(real)))
    teacher = data.draw(st.sampled_from(sorted(real)))
    size = len(real[student].tokenizer) + 10
    rows = data.draw(st.lists(st.lists(st.integers(0, size), max_size=30), min_size=1, max_size=4))
    for ids, spans in zip(rows, align_ids_batch(rows, real[teacher].tokenizer, real[student].tokenizer), strict=True):
        assert spans.student_ids.tolist() == ids
        assert (np.diff(spans.bounds) > 0).all()
        assert spans.bounds[0] == 0
        covered = spans.student_span[spans.student_span >= 0]
        assert (spans.student_span[len(covered) :] == -1).all()
        assert (np.diff(covered) >= 0).all()
        assert set(covered.tolist()) == set(range(spans.n_spans))
        assert (np.diff(spans.teacher_span) >= 0).all()
        assert set(spans.teacher_span.tolist()) <= set(range(spans.n_spans))


def test_a_character_cut_by_the_length_limit_leaves_its_tokens_in_no_span(real):
    llama3, qwen2 = real["llama3"].tokenizer, real["qwen2"].tokenizer
    ids = llama3("I 🦙", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    spans = align_ids(ids[:3], qwen2, llama3)
    # The second token holds the space and the first bytes of the emoji, so only the letter is in a span.
    assert spans.bounds.tolist() == [0, 1]
    assert spans.student_ids.tolist() == ids[:3]
    assert spans.student_span.tolist() == [0, -1, -1]
    assert spans.teacher_ids.tolist() == qwen2("I", add_special_tokens=False)["input_ids"]


def test_a_special_token_inside_ends_the_text_and_its_string_does_not(real):
    llama3, qwen2 = real["llama3"].tokenizer, real["qwen2"].tokenizer
    words = llama3("one two", add_special_tokens=False)["input_ids"]
    special = llama3.convert_tokens_to_ids("<|eot_id|>")
    spans = align_ids([*words, special, *words], qwen2, llama3)
    assert spans.bounds.tolist() == [0, 3, 7]
    assert spans.student_span.tolist() == [0, 1, -1, -1, -1]
    spelled = llama3("one<|eot_id|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole = align_ids(spelled, qwen2, llama3)
    assert whole.bounds[-1] == len("one<|eot_id|>")
    assert (whole.student_span >= 0).all()


@pytest.mark.parametrize("ids", [[-1], [[1, 2]], [0.5], ["a"]])
def test_what_is_no_row_of_ids_is_refused(real, ids):
    with pytest.raises(InputError, match="response 0"):
        align_ids(ids, real["qwen2"].tokenizer, real["llama3"].tokenizer)


def test_a_student_whose_ids_do_not_spell_their_text_is_refused(trained):
    with pytest.raises(InputError, match="spell"):
        align_ids([5], trained["byte level"].tokenizer, trained["wordpiece"].tokenizer)
