"""Preference pairs from files: checked once when they are opened, read lazily after that."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from ctpd_nemo.data.files import RowSource, open_source
from ctpd_nemo.data.forms import PreferencePair, RowError, parse_pair
from ctpd_nemo.errors import InputError

logger = logging.getLogger(__name__)


class PreferenceDataset(Sequence[PreferencePair]):
    """The usable pairs of one or more files, in file order.

    Attributes:
        fingerprint: Hash of every pair's id, prompt and responses, in order. It is the same for the same pairs in
            another folder, format or form. Ids made from the file's name (rows without ``id``) count as any other.
        text_bytes: int64 ``[n, 3]``, UTF-8 bytes of prompt, chosen and rejected response of every pair.
        role_orders: The roles of each kind of prompt that there is, with the place of the first.
        skipped: Rows left out, by reason.
    """

    def __init__(self, sources: list[RowSource], scan: "_Scan") -> None:
        self._sources = sources
        self._source_of = np.array(scan.source_of, dtype=np.int32)
        self._row_of = np.array(scan.row_of, dtype=np.int64)
        self.text_bytes = np.array(scan.text_bytes, dtype=np.int64)
        self.fingerprint = scan.hash.hexdigest()
        self.skipped = scan.skipped
        self.role_orders = scan.role_orders

    def __len__(self) -> int:
        return len(self._row_of)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """Read pairs from their files.

        Raises:
            InputError: The file is no longer what it was when it was opened.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        source = self._sources[self._source_of[index]]
        row = int(self._row_of[index])
        try:
            return _read(source, row)
        except RowError as error:
            raise _input_error(source, row, error) from None


def open_preferences(
    paths: str | Path | Sequence[str | Path],
    split: str | None = None,
    on_bad: str = "stop",
) -> PreferenceDataset:
    """Open preference files and check every row.

    Args:
        paths: ``.jsonl`` and ``.parquet`` files and folders that ``datasets``' ``save_to_disk`` wrote; one or several.
        split: The split to read of folders that hold several; plain files have none.
        on_bad: "stop" raises at the first row that is no preference pair, "skip" leaves such rows out and counts them.

    Raises:
        InputError: A file is missing, empty or of no known format; a row is bad and ``on_bad`` is "stop"; no row is
            usable.
    """
    if on_bad not in ("stop", "skip"):
        raise InputError("data.on_bad", repr(on_bad), "'stop' or 'skip'")
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise InputError("data.paths", "no paths", "at least one preference file")
    if split is not None and not any((Path(path) / "dataset_dict.json").exists() for path in paths):
        raise InputError("data.split", repr(split), "no split: none of the given paths holds named splits")
    sources = [open_source(path, split) for path in paths]
    scan = _Scan()
    for number, source in enumerate(sources):
        for row in range(len(source)):
            try:
                scan.keep(number, row, _read(source, row))
            except RowError as error:
                if on_bad == "stop":
                    raise _input_error(source, row, error) from None
                scan.skip(_input_error(source, row, error), error.reason)
    if not scan.row_of:
        found = f"no usable pair in {scan.skipped.total()} rows; the first: {scan.first_skip}"
        raise InputError(", ".join(map(str, paths)), found, "at least one preference pair")
    if scan.skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in scan.skipped.most_common())
        rows = len(scan.row_of) + scan.skipped.total()
        logger.warning(
            "Skipped %d of %d rows (%s). The first: %s", scan.skipped.total(), rows, reasons, scan.first_skip
        )
    if scan.repeated:
        logger.warning(
            "%d of %d pairs repeat an earlier one, prompt and both responses, under another id. The first: %s",
            scan.repeated,
            len(scan.row_of),
            scan.first_repeat,
        )
    return PreferenceDataset(sources, scan)


@dataclass
class _Scan:
    """What one pass over all rows finds."""

    source_of: list[int] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    text_bytes: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skip: InputError | None = None
    place_of_id: dict[str, str] = field(default_factory=dict)
    role_orders: dict[tuple[str, ...], str] = field(default_factory=dict)
    contents: set[int] = field(default_factory=set)
    repeated: int = 0
    first_repeat: str = ""
    hash: "hashlib.blake2b" = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def keep(self, source: int, row: int, pair: PreferencePair) -> None:
        """Take a pair in; raises ``RowError`` where its id is taken."""
        if pair.id in self.place_of_id:
            raise RowError(
                "duplicate_id", f"{pair.id!r}, the id of {self.place_of_id[pair.id]}", "an id of its own", "id"
            )
        self.place_of_id[pair.id] = pair.place
        self.source_of.append(source)
        self.row_of.append(row)
        self.role_orders.setdefault(tuple(message.role for message in pair.prompt), pair.place)
        prompt = [(message.role, message.content) for message in pair.prompt]
        content = json.dumps([pair.id, prompt, pair.chosen, pair.rejected], ensure_ascii=False, separators=(",", ":"))
        self.hash.update(content.encode() + b"\n")
        self._count_repeat(hash((pair.prompt, pair.chosen, pair.rejected)), pair.place)
        prompt_bytes = sum(len(message.content.encode()) for message in pair.prompt)
        self.text_bytes.append((prompt_bytes, len(pair.chosen.encode()), len(pair.rejected.encode())))

    def _count_repeat(self, content: int, place: str) -> None:
        if content in self.contents:
            self.repeated += 1
            self.first_repeat = self.first_repeat or place
        self.contents.add(content)

    def skip(self, error: InputError, reason: str) -> None:
        self.first_skip = self.first_skip or error
        self.skipped[reason] += 1


def _read(source: RowSource, row: int) -> PreferencePair:
    return parse_pair(source.read(row), f"{source.stem}-{source.line(row)}", source.place(row))


def _input_error(source: RowSource, row: int, error: RowError) -> InputError:
    place = source.place(row) + (f", field {error.field!r}" if error.field else "")
    return InputError(place, error.found, error.expected)
