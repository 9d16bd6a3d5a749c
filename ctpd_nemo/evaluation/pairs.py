"""Held-out pairs, read and encoded for the models that are to judge them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.base_models import RECORD, read_json

# What needs transformers is imported where it is used: it takes seconds to load.
if TYPE_CHECKING:
    from ctpd_nemo.data.encode import PairEncoder
    from ctpd_nemo.data.encoded_pair import EncodedPair
    from ctpd_nemo.data.forms import PreferencePair

logger = logging.getLogger(__name__)

_EXTRAS = ("answer", "kind", "fault", "fact")


class Row(NamedTuple):
    """A pair, and what a generated row says beside it."""

    pair: PreferencePair
    answer: str | None
    kind: str | None
    fault: str | None
    fact: str | None

    @property
    def cluster(self) -> str:
        """What the pair asks, in whatever words: the fact where the row names it, else its prompt as it stands."""
        return repr(self.pair.prompt) if self.fact is None else self.fact

    @property
    def file_and_row(self) -> str:
        """Where the pair was read, without the folder."""
        return Path(self.pair.place).name


def read_rows(
    path: str | Path,
    limit: int | None,
    encoders: Sequence[PairEncoder],
    on_bad: str = "stop",
    split: str | None = None,
) -> tuple[list[Row], Counter[str]]:
    """The pairs of files, and how many rows were left out, by reason.

    Args:
        path: A file, pattern or folder.
        limit: Pairs at most; ``None`` for all.
        encoders: Those that are to encode them.
        on_bad: "stop" at a row that cannot be used, or "skip" it.
        split: Which split of a folder that has several.

    Raises:
        InputError: A row cannot be used, or none.
    """
    from ctpd_nemo.data.config import longest_row
    from ctpd_nemo.data.messages import MEANT
    from ctpd_nemo.data.preferences import open_preferences

    if limit is not None and limit < 1:
        raise InputError("limit", str(limit), "1 or more")
    kept = MEANT
    for encoder in encoders:
        kept |= encoder.kept
    longest = longest_row(max(encoder.max_length for encoder in encoders))
    pairs = open_preferences(path, split, on_bad=on_bad, kept=kept, max_bytes=longest)
    rows = []
    for index in range(len(pairs) if limit is None else min(limit, len(pairs))):
        fields = pairs.fields(index)
        extras = [fields.get(name) for name in _EXTRAS]
        for name, value in zip(_EXTRAS, extras, strict=True):
            if not isinstance(value, str | None):
                raise InputError(f"{pairs.place(index)}, field {name!r}", type(value).__name__, "a string, or none")
        rows.append(Row(pairs[index], *extras))
    return rows, pairs.skipped


def pair_encoder(
    folder: Path,
    chat_template: str | Path | None,
    max_length: int,
    include_eos: bool,
    variables: Mapping[str, Any] | None = None,
    on_bad: str = "stop",
) -> PairEncoder:
    from ctpd_nemo.data.encode import PairEncoder
    from ctpd_nemo.data.templates import Side
    from ctpd_nemo.data.tokenizer_folder import load_tokenizer

    given = trained_variables(folder) if variables is None else variables
    side = Side(load_tokenizer(str(folder)), chat_template, given)
    return PairEncoder(side, None, include_eos, max_length, on_bad=on_bad)


def trained_variables(folder: Path) -> dict[str, Any]:
    """What the chat template of an export was given when it was trained."""
    record = read_json(folder / RECORD)
    found: Any = record.get("config")
    for key in ("model", record.get("policy"), "chat_template_kwargs"):
        found = found.get(key) if isinstance(found, dict) and isinstance(key, str) else None
    return found if isinstance(found, dict) else {}


def encode_rows(
    rows: list[Row], encoders: Sequence[PairEncoder]
) -> tuple[list[Row], list[list[EncodedPair]], Counter[str]]:
    """Encode with each encoder the rows that all of them can encode; the others are counted by reason."""
    from ctpd_nemo.data.encoded_pair import EncodedPair

    kept: list[Row] = []
    encoded: list[list[EncodedPair]] = [[] for _ in encoders]
    skipped: Counter[str] = Counter()
    pairs = [row.pair for row in rows]
    results = [encoder.encode(range(len(pairs)), pairs) for encoder in encoders]
    for row, *result in zip(rows, *results, strict=True):
        fits = [pair for pair in result if isinstance(pair, EncodedPair)]
        if len(fits) == len(result):
            kept.append(row)
            for column, pair in zip(encoded, fits, strict=True):
                column.append(pair)
        else:
            skipped[next(pair.reason for pair in result if not isinstance(pair, EncodedPair))] += 1
    if not kept:
        raise InputError("max_length", f"no pair that fits ({dict(skipped)})", "at least one pair to evaluate")
    if skipped:
        logger.warning("Left out %d of %d pairs: %s", skipped.total(), len(rows), dict(skipped))
    n_cut = sum(pair.chosen.truncated or pair.rejected.truncated for pair in encoded[0])
    if n_cut:
        longest = encoders[0].max_length
        logger.warning("Responses of %d pairs are cut: sequences are of %d tokens at most", n_cut, longest)
    return kept, encoded, skipped
