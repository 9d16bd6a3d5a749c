"""One assertion for all the tests of this room."""

import itertools

from ctpd_nemo.spans import align_batch
from tests.spans import oracle


def as_lists(spans) -> list[list[int]]:
    fields = (spans.bounds, spans.teacher_ids, spans.student_ids, spans.teacher_span, spans.student_span)
    return [field.tolist() for field in fields]


def assert_every_ordered_pair_matches(texts: list[str], hands: dict) -> None:
    """Align ``texts`` with every ordered pair of tokenizers, a tokenizer with itself included, and ask the oracle."""
    sides = {name: [hand.side(text) for text in texts] for name, hand in hands.items()}
    for teacher, student in itertools.product(hands, repeat=2):
        found = align_batch(texts, hands[teacher].tokenizer, hands[student].tokenizer)
        assert len(found) == len(texts)
        for text, spans, one, other in zip(texts, found, sides[teacher], sides[student], strict=True):
            assert as_lists(spans) == list(oracle.aligned(text, one, other)), (teacher, student, text[:200])


def assert_covers(text: str, spans) -> None:
    """Bytes in order, each in one span, and every token in a span."""
    assert spans.bounds[0] == 0
    assert spans.bounds[-1] == len(text.encode())
    assert (spans.bounds[1:] > spans.bounds[:-1]).all()
    for ids, span in ((spans.teacher_ids, spans.teacher_span), (spans.student_ids, spans.student_span)):
        assert len(ids) == len(span)
        assert (span[1:] >= span[:-1]).all()
        assert len(ids) == 0 or set(span.tolist()) == set(range(spans.n_spans))
