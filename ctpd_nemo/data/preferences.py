"""Preference pairs from files: checked once when they are opened, read lazily after that."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.files import RowSource, open_sources
from ctpd_nemo.data.forms import PreferencePair, parse_pair
from ctpd_nemo.data.messages import MEANT, KeptFields, RowError
from ctpd_nemo.data.paths import expand, has_splits, is_saved_dataset
from ctpd_nemo.errors import InputError

logger = logging.getLogger(__name__)


class PreferenceDataset(Sequence[PreferencePair]):
    """The usable pairs of one or more files, in file order. A pair is known by its number here, not by its id.

    Attributes:
        fingerprint: Hash of every pair's id, prompt and responses, in order. It is the same for the same pairs in
            another folder, format or form. Ids made from the file's name (rows without ``id``) count as any other.
        text_bytes: int64 ``[n, 3]``, UTF-8 bytes of prompt, chosen and rejected response of every pair.
        content_hashes: uint64 ``[n]``, of every pair's prompt and responses.
        role_orders: The roles of each kind of plain prompt that there is, with the place of the first.
        first_of_kinds: The first pair of each kind that is not plain: by roles, and by names of what else it holds.
        shared_ids: Those that several pairs have.
        skipped: Rows left out, by reason.
    """

    def __init__(self, sources: list[RowSource], scan: "_Scan", kept: KeptFields) -> None:
        self._sources = sources
        self._kept = kept
        self._source_of = np.array(scan.source_of, dtype=np.int32)
        self._row_of = np.array(scan.row_of, dtype=np.int64)
        self.text_bytes = np.array(scan.text_bytes, dtype=np.int64)
        self.content_hashes = np.array(scan.content_hashes, dtype=np.uint64)
        self.fingerprint = scan.hash.hexdigest()
        self.skipped = scan.skipped
        self.role_orders = scan.role_orders
        self.first_of_kinds = list(scan.kinds.values())
        self.shared_ids = frozenset(scan.shared_ids)

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
        source, row = self._find(index)
        try:
            return _read(source, row, self._kept)
        except RowError as error:
            raise _input_error(source, row, error) from None

    def place(self, index: int) -> str:
        """Where a pair was read, as its ``place``, without reading it."""
        source, row = self._find(index)
        return source.place(row)

    def fields(self, index: int) -> dict[str, Any]:
        """All fields of a pair's row that its file gives.

        Raises:
            InputError: The file is no longer what it was when it was opened.
        """
        source, row = self._find(index)
        try:
            return source.read(row)
        except RowError as error:
            raise _input_error(source, row, error) from None

    def check_unchanged(self) -> None:
        """Stop where a file no longer holds what it did when it was opened; cheap where it does.

        Raises:
            InputError: It names the file.
        """
        for source in self._sources:
            for watched in source.watched:
                if change := watched.change():
                    raise InputError(str(watched.path), change, "the file that the job began with")

    def numbers_in(self, other: "PreferenceDataset") -> NDArray[np.int64]:
        """For each pair the number of one in another dataset with the same prompt and responses, int64 ``[n]``.

        Raises:
            InputError: There is none.
        """
        order = np.argsort(other.content_hashes, kind="stable")
        nearest = np.searchsorted(other.content_hashes, self.content_hashes, sorter=order)
        numbers = order[np.minimum(nearest, len(other) - 1)]
        missing = np.flatnonzero(other.content_hashes[numbers] != self.content_hashes)
        if len(missing):
            found = f"{len(missing)} of {len(self)} pairs that are not among those of the cache"
            raise InputError(self.place(int(missing[0])), found, "pairs of data.train, which were scored")
        return numbers

    def _find(self, index: int) -> tuple[RowSource, int]:
        return self._sources[self._source_of[index]], int(self._row_of[index])


def open_preferences(
    paths: str | Path | Sequence[str | Path],
    split: str | None = None,
    on_bad: str = "stop",
    kept: KeptFields = MEANT,
    max_bytes: int | None = None,
) -> PreferenceDataset:
    """Open preference files and check every row.

    Args:
        paths: Files, patterns of files, and folders, see ``data.paths``; one or several.
        split: The split to read of folders that hold several; plain files have none.
        on_bad: "stop" raises at the first row that is no preference pair, "skip" leaves such rows out and counts them.
        kept: What is kept of rows and messages beside the text of a pair.
        max_bytes: UTF-8 bytes of prompt and responses of a row at most; ``None`` for any number.

    Raises:
        InputError: A file is missing, empty or of no known format; a row is bad and ``on_bad`` is "stop"; no row is
            usable.
    """
    if on_bad not in ("stop", "skip"):
        raise InputError("data.on_bad", repr(on_bad), "'stop' or 'skip'")
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise InputError("data.paths", "no paths", "at least one preference file")
    sources = list(_sources(expand(paths), split, kept))
    scan = _Scan(max_bytes)
    for number, source in enumerate(sources):
        for row in range(len(source)):
            try:
                scan.keep(number, row, _read(source, row, kept))
            except RowError as error:
                if on_bad == "stop":
                    raise _input_error(source, row, error) from None
                scan.skip(_input_error(source, row, error), error.reason)
    if not scan.row_of:
        found = f"no usable pair in {scan.skipped.total()} rows; the first: {scan.first_skip}"
        raise InputError(", ".join(map(str, paths)), found, "at least one preference pair")
    scan.tell()
    return PreferenceDataset(sources, scan, kept)


def _sources(paths: Sequence[Path], split: str | None, kept: KeptFields) -> Iterator[RowSource]:
    with_splits = [path for path in paths if _has_splits(path)]
    if split is not None and not with_splits:
        raise InputError("data.split", repr(split), "no split: none of the given paths holds named splits")
    for path in paths:
        yield from open_sources(path, split if path in with_splits else None, kept)


def _has_splits(path: Path) -> bool:
    if not path.is_dir():
        return False
    return (path / "dataset_dict.json").exists() if is_saved_dataset(path) else has_splits(path)


@dataclass
class _Scan:
    """What one pass over all rows finds."""

    max_bytes: int | None
    source_of: list[int] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    text_bytes: list[tuple[int, int, int]] = field(default_factory=list)
    content_hashes: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skip: InputError | None = None
    role_orders: dict[tuple[str, ...], str] = field(default_factory=dict)
    kinds: dict[tuple[Any, ...], int] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    shared_ids: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    repeated: int = 0
    first_repeat: str = ""
    hash: "hashlib.blake2b" = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def keep(self, source: int, row: int, pair: PreferencePair) -> None:
        """Take a pair in; raises ``RowError`` where it is too long."""
        content, plain = pair.content(), pair.is_plain
        # What else the pair holds counts as prompt, which most of it is.
        chosen, rejected = len(pair.chosen.encode()), len(pair.rejected.encode())
        prompt = sum(len(message.content.encode()) for message in pair.prompt)
        if not plain:
            prompt = max(prompt, len(content.encode()) - chosen - rejected)
        self._check_size(prompt + chosen + rejected)
        if plain:
            self.role_orders.setdefault(tuple(message.role for message in pair.prompt), pair.place)
        else:
            self.kinds.setdefault(_kind(pair), len(self.row_of))
        (self.shared_ids if pair.id in self.ids else self.ids).add(pair.id)
        self.source_of.append(source)
        self.row_of.append(row)
        self.text_bytes.append((prompt, chosen, rejected))
        # The content with the id in front, as one list.
        encoded = content.encode()
        self.hash.update(b"[%b,%b\n" % (json.dumps(pair.id, ensure_ascii=False).encode(), encoded[1:]))
        self._count_repeat(encoded, pair.place)

    def _check_size(self, size: int) -> None:
        if self.max_bytes is not None and size > self.max_bytes:
            expected = f"at most {self.max_bytes:,}, or more in data.max_row_bytes"
            raise RowError("too_many_bytes", f"{size:,} bytes of text", expected)

    def _count_repeat(self, content: bytes, place: str) -> None:
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        self.content_hashes.append(number)
        if number in self.seen:
            self.repeated += 1
            self.first_repeat = self.first_repeat or place
        self.seen.add(number)

    def skip(self, error: InputError, reason: str) -> None:
        self.first_skip = self.first_skip or error
        self.skipped[reason] += 1

    def tell(self) -> None:
        """Say what was skipped, and what is there twice."""
        if self.skipped:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.skipped.most_common())
            rows = len(self.row_of) + self.skipped.total()
            logger.warning(
                "Skipped %d of %d rows (%s). The first: %s", self.skipped.total(), rows, reasons, self.first_skip
            )
        if self.repeated:
            logger.warning(
                "%d of %d pairs repeat an earlier one, prompt and both responses. The first: %s",
                self.repeated,
                len(self.row_of),
                self.first_repeat,
            )


def _kind(pair: PreferencePair) -> tuple[Any, ...]:
    """What a template may take or refuse a pair by, beside its texts."""
    turns = tuple((message.role, *sorted(message.extra)) for message in pair.prompt)
    return turns, tuple(sorted(pair.fields)), tuple((name, *sorted(pair.whole[name].extra)) for name in pair.whole)


def _read(source: RowSource, row: int, kept: KeptFields) -> PreferencePair:
    return parse_pair(source.read(row), f"{source.stem}-{source.line(row)}", source.place(row), kept)


def _input_error(source: RowSource, row: int, error: RowError) -> InputError:
    place = source.place(row) + (f", field {error.field!r}" if error.field else "")
    return InputError(place, error.found, error.expected)
