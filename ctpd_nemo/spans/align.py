"""Aligned spans: the bounds that two tokenizations of a text share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.spans.byte_ends import TokenEnds, batch_token_ends, utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class AlignedSpans:
    """Two tokenizations of one text, cut into the smallest runs of tokens that cover the same bytes.

    Span s covers bytes ``bounds[s]:bounds[s + 1]`` of the text, the teacher tokens with ``teacher_span == s`` and the
    student tokens with ``student_span == s``. Every span holds tokens of both sides, and no span can be cut further:
    every byte at which a token is known to end on both sides is a bound.

    An empty text has no spans and no tokens: ``bounds`` is ``[0]``. A text in which one tokenizer finds no token at all
    (only spaces, for a tokenizer that drops them) is one span, with the tokens of the other side alone.

    Attributes:
        bounds: int64 [n_spans + 1], byte offsets into ``text.encode("utf-8")``, strictly ascending, 0 first and the
            length last.
        teacher_ids: int64 [n_teacher], the teacher's token ids of the text alone, no special tokens.
        student_ids: int64 [n_student], the student's.
        teacher_span: int32 [n_teacher], the span of each teacher token, ascending.
        student_span: int32 [n_student], the span of each student token, ascending. Of sampled ids (``align_ids``) those
            at the end may be in no span: -1.
    """

    bounds: NDArray[np.int64]
    teacher_ids: NDArray[np.int64]
    student_ids: NDArray[np.int64]
    teacher_span: NDArray[np.int32]
    student_span: NDArray[np.int32]

    @property
    def n_spans(self) -> int:
        return len(self.bounds) - 1


def align(text: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> AlignedSpans:
    """Tokenize a text with both tokenizers and cut it into aligned spans.

    A special token's string inside the text is text. The tokenizers are only read. With the same object on both sides
    the text is tokenized once, and a span is the shortest run of tokens that ends on a known byte.

    Args:
        text: any string that UTF-8 can encode, empty too.
        teacher: a Hugging Face fast tokenizer.
        student: another one, or the same.

    Raises:
        InputError: the text holds a lone surrogate, or a tokenizer is not a fast one.
    """
    return align_batch([text], teacher, student)[0]


def align_batch(
    texts: Sequence[str], teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> list[AlignedSpans]:
    """Align many texts at once: the same as ``align`` on each, at a fraction of the time for short texts."""
    encoded = utf8(texts)
    teacher_side = batch_token_ends(texts, encoded, teacher)
    if student is teacher:
        student_side = replace(teacher_side, ids=teacher_side.ids.copy())
    else:
        student_side = batch_token_ends(texts, encoded, student)
    return intersect(teacher_side, student_side)


def intersect(teacher: TokenEnds, student: TokenEnds) -> list[AlignedSpans]:
    """Cut a batch of texts at the ends that both sides know, on the byte axis that they share."""
    first_byte = teacher.first_byte
    is_bound = _end_marks(teacher)
    is_bound &= _end_marks(student)
    # Texts begin and end at bounds by definition, also where one side has no token.
    is_bound[first_byte] = True
    bounds = is_bound.nonzero()[0]
    # The last byte of a token tells its span, counted from the first of the batch: the bounds up to that byte.
    bounds_so_far = is_bound.cumsum(dtype=np.int32)
    teacher_span, student_span = bounds_so_far[teacher.ends - 1], bounds_so_far[student.ends - 1]
    spans_so_far = bounds_so_far[first_byte].tolist()
    return [
        AlignedSpans(
            bounds=bounds[spans_so_far[k] - 1 : spans_so_far[k + 1]] - first_byte[k],
            teacher_ids=teacher.ids[of_teacher],
            student_ids=student.ids[of_student],
            teacher_span=teacher_span[of_teacher] - spans_so_far[k],
            student_span=student_span[of_student] - spans_so_far[k],
        )
        for k, (of_teacher, of_student) in enumerate(zip(_token_slices(teacher), _token_slices(student), strict=True))
    ]


def _end_marks(side: TokenEnds) -> NDArray[np.bool_]:
    """Whether a token of this side ends at each byte: bool [n_bytes + 1]."""
    marks = np.zeros(side.first_byte[-1] + 1, dtype=np.bool_)
    marks[side.ends] = True
    return marks


def _token_slices(side: TokenEnds) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(side.first_token)]
