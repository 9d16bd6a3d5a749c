"""How two tokenizers disagree on a set of texts, counted in spans."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import TYPE_CHECKING

import numpy as np

from ctpd_nemo.spans.align import AlignedSpans, intersect
from ctpd_nemo.spans.byte_ends import batch_token_ends, utf8
from ctpd_nemo.spans.pieces import UNKNOWN_BYTES
from ctpd_nemo.spans.text_reader import text_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Teacher tokens : student tokens of a span. "other": a text in which one of the two finds no token.
KINDS = ("1:1", "1:n", "n:1", "n:m", "other")
_MIRRORED = {"1:n": "n:1", "n:1": "1:n"}


@dataclass
class Mismatch:
    """Counts of one ordered pair of tokenizers.

    Attributes:
        teacher: Name of the teacher's tokenizer.
        student: Name of the student's.
        spans: Aligned spans by kind, see ``KINDS``.
        teacher_tokens: All tokens of the teacher's tokenizer.
        student_tokens: All tokens of the student's.
        vocabulary: Pieces of teacher, of student, and of both, see ``vocabulary_pieces``.
    """

    teacher: str
    student: str
    spans: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    teacher_tokens: int = 0
    student_tokens: int = 0
    vocabulary: tuple[int, int, int] = (0, 0, 0)

    @property
    def n_spans(self) -> int:
        """Spans of all kinds."""
        return sum(self.spans.values())

    def share(self, kind: str) -> float | None:
        """Share of the spans that are of a kind; ``None`` without spans."""
        return _ratio(self.spans[kind], self.n_spans)

    @property
    def teacher_tokens_per_span(self) -> float | None:
        """Mean; ``None`` without spans."""
        return _ratio(self.teacher_tokens, self.n_spans)

    @property
    def student_tokens_per_span(self) -> float | None:
        """Mean; ``None`` without spans."""
        return _ratio(self.student_tokens, self.n_spans)

    @property
    def teacher_tokens_alone(self) -> float | None:
        """Share of the teacher's tokens that stand in 1:1 spans; ``None`` without tokens."""
        return _ratio(self.spans["1:1"], self.teacher_tokens)

    @property
    def student_tokens_alone(self) -> float | None:
        """Share of the student's tokens that stand in 1:1 spans; ``None`` without tokens."""
        return _ratio(self.spans["1:1"], self.student_tokens)

    @property
    def vocabulary_overlap(self) -> float | None:
        """Pieces of both over pieces of either (Jaccard); ``None`` for two empty vocabularies."""
        teacher, student, both = self.vocabulary
        return _ratio(both, teacher + student - both)

    def mirrored(self) -> "Mismatch":
        """The counts with teacher and student in each other's place: spans are the same both ways."""
        spans = {kind: self.spans[_MIRRORED.get(kind, kind)] for kind in KINDS}
        teacher, student, both = self.vocabulary
        names = self.student, self.teacher
        return Mismatch(*names, spans, self.student_tokens, self.teacher_tokens, (student, teacher, both))


def mismatch_table(
    batches: Iterable[Sequence[str]], tokenizers: Mapping[str, "PreTrainedTokenizerBase"]
) -> list[Mismatch]:
    """Count the spans of every ordered pair of tokenizers over some texts.

    Args:
        batches: The texts, a few hundred at a time; each is tokenized once by every tokenizer.
        tokenizers: Two or more fast tokenizers by name.

    Returns:
        One row an ordered pair, in the order of ``tokenizers``.
    """
    pairs = {names: Mismatch(*names) for names in combinations(tokenizers, 2)}
    for texts in filter(None, batches):
        encoded = utf8(texts)
        sides = {name: batch_token_ends(texts, encoded, tokenizer) for name, tokenizer in tokenizers.items()}
        for (teacher, student), row in pairs.items():
            _add(row, intersect(sides[teacher], sides[student]))
    pieces = {name: vocabulary_pieces(tokenizer) for name, tokenizer in tokenizers.items()}
    for (teacher, student), row in pairs.items():
        mine, others = pieces[teacher], pieces[student]
        row.vocabulary = len(mine), len(others), len(mine & others)
    return [pairs[names] if names in pairs else pairs[names[::-1]].mirrored() for names in permutations(tokenizers, 2)]


def vocabulary_pieces(tokenizer: "PreTrainedTokenizerBase") -> set[bytes]:
    """The different byte strings that a tokenizer's ids stand for; special tokens and unknown ones left out.

    A space is a space, whether the vocabulary writes it as U+0120 or U+2581.
    """
    table = text_reader(tokenizer).pieces
    data = table.buffer.tobytes()
    spans = zip(table.starts.tolist(), table.lengths.tolist(), strict=True)
    return {data[start : start + length] for start, length in spans} - {UNKNOWN_BYTES}


def span_kind(teacher_tokens: int, student_tokens: int) -> str:
    """The kind of a span of so many tokens."""
    if not teacher_tokens or not student_tokens:
        return "other"
    many = "m" if teacher_tokens > 1 and student_tokens > 1 else "n"
    return f"{'n' if teacher_tokens > 1 else 1}:{many if student_tokens > 1 else 1}"


def _add(row: Mismatch, aligned: Sequence[AlignedSpans]) -> None:
    """Count the spans of a batch."""
    teacher, student = (
        np.concatenate([np.bincount(getattr(text, side), minlength=text.n_spans) for text in aligned])
        for side in ("teacher_span", "student_span")
    )
    row.teacher_tokens += int(teacher.sum())
    row.student_tokens += int(student.sum())
    # At most two tokens are told apart from more: 0, 1, or several of either side.
    for code, count in enumerate(np.bincount(np.minimum(teacher, 2) * 3 + np.minimum(student, 2), minlength=9)):
        row.spans[span_kind(code // 3, code % 3)] += int(count)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
