"""One text under two tokenizations, span by span, ready to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.report.letters import Part, readable
from ctpd_nemo.report.mismatch import span_kind
from ctpd_nemo.report.scores import ResponseScores
from ctpd_nemo.spans import align
from ctpd_nemo.spans.pieces import UNKNOWN_BYTES
from ctpd_nemo.spans.text_reader import text_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Token:
    """A token, by its id, and the bytes that the id stands for."""

    id: int
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Band:
    """A span.

    Attributes:
        number: From 1.
        first_byte: Of the text's UTF-8 bytes; ``None`` for the end of turn, which is no text.
        end_byte: The byte behind the last.
        kind: See ``mismatch.KINDS``; "end" for the end of turn.
        parts: Its text.
        cut: For each character that the span holds only a part of: which of its bytes.
        teacher: The teacher's tokens.
        student: The student's.
        numbers: Scores by name; empty where nothing is known.
        heat: The same on a scale from -1 to 1, see ``scores``.
    """

    number: int
    first_byte: int | None
    end_byte: int | None
    kind: str
    parts: list[Part]
    cut: list[str]
    teacher: list[Token]
    student: list[Token]
    numbers: dict[str, float] = field(default_factory=dict)
    heat: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextView:
    """A text in bands.

    Attributes:
        title: What the text is.
        bands: Its first spans.
        n_spans: How many there are.
        notes: What a reader has to know: what is not shown, what has no score.
        asked: What the text is a response to.
    """

    title: str
    bands: list[Band]
    n_spans: int
    notes: list[str]
    asked: list[Part] = field(default_factory=list)


def text_view(
    title: str,
    text: str,
    teacher: "PreTrainedTokenizerBase",
    student: "PreTrainedTokenizerBase",
    longest: int,
    scores: ResponseScores | None = None,
) -> TextView:
    """Cut a text into bands.

    Args:
        title: What the text is.
        text: Any text without lone surrogates.
        teacher: A fast tokenizer.
        student: Another.
        longest: Spans that are shown at most.
        scores: Of the spans, and of the end of turn where that was scored.
    """
    spans = align(text, teacher, student)
    shown = min(spans.n_spans, longest)
    data, bounds = text.encode(), spans.bounds.tolist()
    char_begins = _character_begins(data)
    sides = [
        _tokens_by_span(tokenizer, ids, of_span, shown)
        for tokenizer, ids, of_span in (
            (teacher, spans.teacher_ids, spans.teacher_span),
            (student, spans.student_ids, spans.student_span),
        )
    ]
    bands = []
    for number, (begin, end, mine, others) in enumerate(zip(bounds, bounds[1:], *sides, strict=False)):
        cut = _cut_characters(data, char_begins, begin, end)
        known = _scores_of(scores, number)
        kind = span_kind(len(mine), len(others))
        bands.append(Band(number + 1, begin, end, kind, readable(data[begin:end]), cut, mine, others, **known))
    notes = [f"the first {shown:,} of {spans.n_spans:,} spans"] if shown < spans.n_spans else []
    if scores is not None:
        if len(scores) < spans.n_spans:
            notes.append(f"cut off behind span {len(scores):,} when it was scored")
        elif len(scores) > spans.n_spans and shown == spans.n_spans:
            known = _scores_of(scores, shown)
            bands.append(Band(shown + 1, None, None, "end", [Part("code", "end of turn")], [], [], [], **known))
    return TextView(title, bands, spans.n_spans, notes)


def _tokens_by_span(
    tokenizer: "PreTrainedTokenizerBase", ids: NDArray[np.int64], span: NDArray[np.int32], shown: int
) -> list[list[Token]]:
    """The tokens of each of the first spans."""
    table = text_reader(tokenizer).pieces
    rows: list[list[Token]] = [[] for _ in range(shown)]
    kept = int(np.searchsorted(span, shown))
    spelled, piece_bounds = table.spell(ids[:kept])
    for index, (token, of_span) in enumerate(zip(ids[:kept].tolist(), span[:kept].tolist(), strict=True)):
        piece = spelled[piece_bounds[index] : piece_bounds[index + 1]]
        if piece == UNKNOWN_BYTES:
            piece = str(tokenizer.convert_ids_to_tokens(token)).encode("utf-8", "replace")
        rows[of_span].append(Token(token, readable(piece)))
    return rows


def _character_begins(data: bytes) -> NDArray[np.int64]:
    """Where characters begin, and the end: int64 [n_characters + 1]."""
    is_lead = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    return np.append(np.flatnonzero(is_lead), len(data))


def _cut_characters(data: bytes, char_begins: NDArray[np.int64], begin: int, end: int) -> list[str]:
    """The characters that bytes ``begin:end`` hold a part of, as "bytes 1-2 of 4 of U+1F999"."""
    first = int(np.searchsorted(char_begins, begin, side="right")) - 1
    last = int(np.searchsorted(char_begins, end, side="left")) - 1
    cut = []
    for char in dict.fromkeys((first, last)):
        start, stop = int(char_begins[char]), int(char_begins[char + 1])
        if start < begin or stop > end:
            held = f"{max(begin, start) - start + 1}-{min(end, stop) - start}"
            cut.append(f"bytes {held} of {stop - start} of U+{ord(data[start:stop].decode()):04X}")
    return cut


def _scores_of(scores: ResponseScores | None, number: int) -> dict[str, Any]:
    return {} if scores is None or number >= len(scores) else scores.of_span(number)


def kinds_of(views: Sequence[TextView]) -> list[str]:
    """The kinds of span that are shown, for a legend."""
    return list(dict.fromkeys(band.kind for view in views for band in view.bands))
