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
    from ctpd_nemo.data.encode import EncodedPair, PairEncoder
    from ctpd_nemo.data.forms import PreferencePair

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A pair, and what a generated row says beside it."""

    pair: PreferencePair
    answer: str | None
    kind: str | None
    fault: str | None


def read_rows(path: Path, limit: int | None) -> list[Row]:
    from ctpd_nemo.data.files import open_source
    from ctpd_nemo.data.preferences import open_preferences

    if limit is not None and limit < 1:
        raise InputError("limit", str(limit), "1 or more")
    pairs = open_preferences(path)
    # Every row is a pair, or open_preferences would have stopped: pairs and rows have the same numbers.
    source = open_source(path, None)
    rows = []
    for index in range(len(pairs) if limit is None else min(limit, len(pairs))):
        fields = source.read(index)
        extras = [fields.get(name) for name in ("answer", "kind", "fault")]
        for name, value in zip(("answer", "kind", "fault"), extras, strict=True):
            if not isinstance(value, str | None):
                raise InputError(f"{source.place(index)}, field {name!r}", type(value).__name__, "a string, or none")
        rows.append(Row(pairs[index], *extras))
    return rows


def pair_encoder(
    folder: Path,
    chat_template: str | Path | None,
    max_length: int,
    include_eos: bool,
    variables: Mapping[str, Any] | None = None,
) -> PairEncoder:
    from ctpd_nemo.data.encode import PairEncoder
    from ctpd_nemo.data.templates import Side
    from ctpd_nemo.data.tokenizer_folder import load_tokenizer

    given = trained_variables(folder) if variables is None else variables
    return PairEncoder(Side(load_tokenizer(str(folder)), chat_template, given), None, include_eos, max_length)


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
    from ctpd_nemo.data.encode import EncodedPair

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
