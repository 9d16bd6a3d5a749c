"""Aligned spans of ids that are there already, as a model has sampled them.

A model samples ids, not text: in some responses they are not the ids that its tokenizer would make of the same text,
and the bytes that they spell need not be text at all. So the ids stay as they are, the text is what they spell, and
only the teacher's side is tokenized.

The text ends before the first byte that is not UTF-8 (a character that the length limit has cut, or one sampled so),
and before the first id that stands for no text: a special token, a padding row of the vocabulary. A student token
that reaches beyond the last byte at which both sides end a token is in no span, and neither is what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctpd_nemo.errors import InputError
from ctpd_nemo.spans.align import AlignedSpans, intersect
from ctpd_nemo.spans.byte_ends import TokenEnds, batch_token_ends
from ctpd_nemo.spans.pieces import UNKNOWN_BYTES
from ctpd_nemo.spans.text_reader import TextReader, text_reader
from ctpd_nemo.spans.tracing import Int64Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_SPAN = -1


def align_ids(
    student_ids: ArrayLike, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> AlignedSpans:
    """Cut sampled ids, and the teacher's tokens of the text that they spell, into aligned spans.

    The ids are kept as they are, whether or not they are what ``student`` would make of their text. The teacher's side
    is tokenized, also where ``teacher`` is ``student``. A special token's string that ordinary tokens spell is text.

    Args:
        student_ids: ``[n_student]``, the ids of a response without its end of turn; may be empty.
        teacher: a Hugging Face fast tokenizer.
        student: the one whose ids these are.

    Returns:
        The spans of the text up to its last bound. ``student_ids`` are all ids given, and ``student_span`` is -1 for
        those in no span, which stand at the end: see the module docstring. ``teacher_ids`` are the tokens of the spans.

    Raises:
        InputError: an id is negative or no integer, a tokenizer is not a fast one, or the student's ids do not spell
            their text (WordPiece, BPE with word endings).
    """
    return align_ids_batch([student_ids], teacher, student)[0]


def align_ids_batch(
    rows: Sequence[ArrayLike], teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> list[AlignedSpans]:
    """Align many responses at once: the same as ``align_ids`` on each."""
    reader = text_reader(student)
    has_dummy_space = _has_dummy_space(reader, student)
    spelled = [_spell(_checked(row, index), reader, has_dummy_space) for index, row in enumerate(rows)]
    texts = [one.text for one in spelled]
    encoded = [text.encode() for text in texts]
    teacher_side = batch_token_ends(texts, encoded, teacher)
    spans = intersect(teacher_side, _student_side(spelled, teacher_side.first_byte))
    return [_of_all_ids(*row) for row in zip(spans, spelled, map(len, encoded), strict=True)]


class _Spelled(NamedTuple):
    """Ids of one response: the text they spell, and the byte of it at which each id that lies in it ends."""

    ids: Int64Array
    text: str
    ends: Int64Array


def _checked(row: ArrayLike, index: int) -> Int64Array:
    ids = np.asarray(row)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(f"response {index}", f"an array of {ids.dtype}, {ids.ndim}-dimensional", "a row of token ids")
    if ids.size and ids.min() < 0:
        raise InputError(f"response {index}", f"the id {ids.min()}", "token ids, from 0")
    return ids.astype(np.int64)


def _has_dummy_space(reader: TextReader, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer writes a space in front of a text that reading its ids takes away again (SentencePiece).

    Raises:
        InputError: Ids do not spell the text they were made of.
    """
    probe = "a a"
    ids = reader.ids([probe])[0]
    spelled, _ = reader.pieces.spell(np.array(ids, dtype=np.int64))
    if UNKNOWN_BYTES in spelled:
        # A vocabulary without these letters says nothing of how it joins them.
        return False
    if spelled.decode(errors="replace").strip(" ") not in (probe, probe.upper()):
        found = f"ids that spell {spelled!r} for {probe!r}"
        raise InputError(f"tokenizer {tokenizer.name_or_path}", found, "a student whose ids spell their text")
    return spelled.startswith(b" ") and not reader.backend.decode(ids).startswith(" ")


def _spell(ids: Int64Array, reader: TextReader, has_dummy_space: bool) -> _Spelled:
    unknown = np.flatnonzero(ids >= len(reader.pieces.lengths))
    known = ids[: unknown[0]] if len(unknown) else ids
    spelled, piece_bounds = reader.pieces.spell(known)
    dummy = int(has_dummy_space and spelled.startswith(b" "))
    text = _longest_text(spelled[dummy:])
    # A dummy space that is a token by itself ends where the text begins; it closes with the token that follows.
    ends = np.maximum(piece_bounds[1:] - dummy, 0)
    if len(ends) > 1 and ends[0] == 0:
        ends[0] = ends[1]
    inside = int(np.searchsorted(ends, len(text.encode()), side="right"))
    return _Spelled(ids, text, ends[:inside] if text else ends[:0])


def _longest_text(data: bytes) -> str:
    """The text before the first byte that is not UTF-8; ids that stand for no text spell such a byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _student_side(spelled: Sequence[_Spelled], first_byte: list[int]) -> TokenEnds:
    """The ids that lie in their texts, on the byte axis of the batch."""
    lengths = [len(one.ends) for one in spelled]
    nothing = np.zeros(0, dtype=np.int64)
    ids = np.concatenate([nothing, *(one.ids[:length] for one, length in zip(spelled, lengths, strict=True))])
    ends = np.concatenate([nothing, *(one.ends + begin for one, begin in zip(spelled, first_byte[:-1], strict=True))])
    return TokenEnds(ids, ends, list(accumulate(lengths, initial=0)), first_byte)


def _of_all_ids(spans: AlignedSpans, spelled: _Spelled, n_bytes: int) -> AlignedSpans:
    """Leave the last span out where no student token ends with the text, and put the ids behind the spans back."""
    reached = int(spelled.ends[-1]) if len(spelled.ends) else 0
    n_spans = spans.n_spans - (reached < n_bytes)
    student_span = np.full(len(spelled.ids), _NO_SPAN, dtype=np.int32)
    kept = int(np.searchsorted(spans.student_span, n_spans))
    student_span[:kept] = spans.student_span[:kept]
    of_teacher = slice(0, int(np.searchsorted(spans.teacher_span, n_spans)))
    return AlignedSpans(
        bounds=spans.bounds[: n_spans + 1],
        teacher_ids=spans.teacher_ids[of_teacher],
        student_ids=spelled.ids,
        teacher_span=spans.teacher_span[of_teacher],
        student_span=student_span,
    )
