"""The mismatch table against counting by hand."""

from collections import Counter

import pytest
from transformers import AutoTokenizer

from ctpd_nemo.report.mismatch import KINDS, Mismatch, mismatch_table, span_kind, vocabulary_pieces
from ctpd_nemo.spans import token_byte_ends

TEXTS = [
    "Add 6 and 9.",
    "",
    "6 plus 9 makes **14**, of course.",
    "\U0001f999 na\u00efve",
    "   ",
    "Voil\u00e0: 3 plus 0",
]


def closed(ends: list[int]) -> list[int]:
    """Give a token whose end is not known (-1) that of the next token whose end is."""
    for index in reversed(range(len(ends) - 1)):
        if ends[index] == -1:
            ends[index] = ends[index + 1]
    return ends


def by_hand(texts: list[str], teacher: object, student: object) -> Counter[str]:
    """Walk over the bytes of each text; wherever tokens of both sides end, a span does."""
    kinds: Counter[str] = Counter()
    for text in texts:
        sides = [Counter(closed(token_byte_ends(text, side)[1].tolist())) for side in (teacher, student)]
        counts = [0, 0]
        for byte in range(1, len(text.encode()) + 1):
            counts = [count + side[byte] for count, side in zip(counts, sides, strict=True)]
            if (sides[0][byte] and sides[1][byte]) or byte == len(text.encode()):
                n, m = counts
                kinds[
                    "other" if 0 in counts else f"{1 if n == 1 else 'n'}:{1 if m == 1 else 'n' if n == 1 else 'm'}"
                ] += 1
                counts = [0, 0]
    return kinds


def test_the_table_counts_what_a_walk_over_the_bytes_counts(tokenizers: list[str]) -> None:
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in tokenizers)
    there, back = mismatch_table([TEXTS[:2], TEXTS[2:]], {"A": teacher, "B": student})
    assert (there.teacher, there.student, back.teacher, back.student) == ("A", "B", "B", "A")
    expected = by_hand(TEXTS, teacher, student)
    assert {kind: count for kind, count in there.spans.items() if count} == expected
    assert {kind: count for kind, count in back.spans.items() if count} == by_hand(TEXTS, student, teacher)
    n_tokens = [sum(len(token_byte_ends(text, side)[0]) for text in TEXTS) for side in (teacher, student)]
    assert [there.teacher_tokens, there.student_tokens] == n_tokens
    assert there.teacher_tokens_per_span == n_tokens[0] / expected.total()
    assert back.student_tokens_alone == there.spans["1:1"] / n_tokens[0]


def test_a_tokenizer_and_itself_agree_in_everything(tokenizers: list[str]) -> None:
    one, other = (AutoTokenizer.from_pretrained(tokenizers[0]) for _ in range(2))
    row, _ = mismatch_table([["Add 6 and 9."]], {"A": one, "B": other})
    assert row.share("1:1") == 1.0
    assert row.vocabulary_overlap == 1.0


def test_without_texts_shares_are_unknown(tokenizers: list[str]) -> None:
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in tokenizers)
    for batches in ([], [[]], [["", ""]]):
        row, _ = mismatch_table(batches, {"A": teacher, "B": student})
        assert row.n_spans == 0
        assert [row.share(kind) for kind in KINDS] == [None] * len(KINDS)
        assert row.teacher_tokens_per_span is None


def test_vocabularies_are_compared_by_bytes(tokenizers: list[str]) -> None:
    byte_level, sentencepiece = (AutoTokenizer.from_pretrained(folder) for folder in tokenizers)
    pieces = [vocabulary_pieces(tokenizer) for tokenizer in (byte_level, sentencepiece)]
    for char in "0123456789":
        assert all(char.encode() in own for own in pieces)
    special = {token.encode() for side in (byte_level, sentencepiece) for token in side.all_special_tokens}
    assert not special & (pieces[0] | pieces[1])
    spaced = {piece for piece in pieces[1] if piece.startswith(b" ")}
    assert spaced, "U+2581 is read as a space"


@pytest.mark.parametrize(
    ("teacher", "student", "kind"),
    [(1, 1, "1:1"), (1, 3, "1:n"), (2, 1, "n:1"), (2, 2, "n:m"), (0, 1, "other"), (4, 0, "other")],
)
def test_kinds(teacher: int, student: int, kind: str) -> None:
    assert span_kind(teacher, student) == kind


def test_mirrored_counts_change_places() -> None:
    row = Mismatch("A", "B", {"1:1": 5, "1:n": 2, "n:1": 3, "n:m": 1, "other": 0}, 20, 30, (7, 9, 4))
    back = row.mirrored()
    assert back.spans == {"1:1": 5, "1:n": 3, "n:1": 2, "n:m": 1, "other": 0}
    assert (back.teacher, back.teacher_tokens, back.vocabulary) == ("B", 30, (9, 7, 4))
    assert back.vocabulary_overlap == row.vocabulary_overlap == 4 / 12
