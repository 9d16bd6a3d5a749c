"""From what a user names as data to files of rows: patterns, home folders, and folders of files as hubs have them."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctpd_nemo.errors import InputError

PACKED = ".gz"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
EXPECTED = (
    "a .jsonl file (one row a line), .ndjson, .json, any of the three as .gz, a .parquet file, a folder of such files "
    "or one that datasets' save_to_disk wrote"
)
# JSON that describes a dataset and is none.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?", re.ASCII)
# As the datasets library names splits: words of a name, and what they are the split of.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_DEEPEST, _MOST_FILES = 4, 100_000


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is one that ``save_to_disk`` wrote."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Paths with ``~`` as the home folder, and patterns (``data/*.jsonl``) as what they match, in order of the names.

    What is there under the name itself is no pattern.

    Raises:
        InputError: A pattern matches nothing.
    """
    return [found for path in paths for found in _matches(path)]


def _matches(given: str | Path) -> list[Path]:
    if not str(given):
        raise InputError("data", "an empty name", "a preference file")
    path = Path(given)
    try:
        path = path.expanduser()
    except RuntimeError:
        # No such user: then it is a name like any other.
        return [path]
    if not glob.has_magic(str(path)) or path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise InputError(str(path), "no file or folder that matches", "a pattern that matches some")
    return found


def relative_to(folder: Path, path: str) -> str:
    """A path or pattern as it is found from another working folder than ``folder``."""
    if path.startswith("~") or Path(path).is_absolute():
        return path
    return str(Path(glob.escape(str(folder)) if glob.has_magic(path) else folder) / path)


def form_of(path: Path) -> str:
    """The suffix that says what a file holds, in small letters and without that of gzip; "" where it says nothing."""
    suffix = Path(path.name.lower().removesuffix(PACKED)).suffix
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and is_packed(path)) else ""


def is_packed(path: Path) -> bool:
    """Whether a file is packed with gzip, by its name."""
    return path.name.lower().endswith(PACKED)


def stem_of(path: Path) -> str:
    """A file's name without suffixes."""
    return Path(path.stem).stem if is_packed(path) else path.stem


@dataclass(frozen=True)
class _File:
    """A file of rows in a folder.

    Attributes:
        path: Where it is.
        split: The split that it belongs to; "" where its name says nothing.
        config: Folders on its way that are no split's.
        shard: Its number among how many, where its name says so.
    """

    path: Path
    split: str
    config: tuple[str, ...]
    shard: tuple[int, int] | None


def files_of_folder(folder: Path, split: str | None) -> tuple[str, list[Path]]:
    """The files of rows in a folder, or those of one of its splits, in order of their names.

    A split is what shards are named by (``train_prefs-00000-of-00002.parquet``), or what a folder or file is by a word
    of its name (``test/0000.parquet``, ``my-dev.jsonl``). Files without such words belong together.

    Returns:
        The name of the split, "" where there is none; and the files.

    Raises:
        InputError: No such file, or not clear which; shards that are missing.
    """
    files = [_described(folder, path) for path in _walk(folder)]
    if not files:
        found = "a folder without state.json or dataset_dict.json, and without files of rows"
        raise InputError(str(folder), found, f"{EXPECTED}, as files or in folders below")
    names = sorted({file.split for file in files if file.split})
    if split is None and len(names) > 1:
        raise InputError(
            str(folder), f"the splits {', '.join(names)} and none asked for", "the name of one split (data.split)"
        )
    if split is None and names and any(not file.split for file in files):
        other = next(file.path for file in files if not file.split)
        found = f"{other.relative_to(folder)} beside the split {names[0]}"
        raise InputError(str(folder), found, "the name of a split (data.split), or the files themselves")
    wanted = split if split is not None else (names[0] if names else "")
    chosen = [file for file in files if file.split == wanted]
    if not chosen:
        known = f"one of {', '.join(names)}" if names else "no data.split: its files name no splits"
        raise InputError(str(folder), f"no split {wanted!r}", known)
    _check_alike(folder, chosen)
    return wanted, [file.path for file in chosen]


def has_splits(folder: Path) -> bool:
    """Whether a folder of files has splits to choose from."""
    return any(_described(folder, path).split for path in _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    seen = 0
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEEPEST else []
        for name in sorted(names):
            path = Path(place) / name
            if form_of(path) and not name.startswith(".") and name not in _DESCRIPTIONS and path.is_file():
                seen += 1
                if seen > _MOST_FILES:
                    raise InputError(str(folder), f"more than {_MOST_FILES:,} files of rows", "a folder of fewer")
                yield path


def _described(folder: Path, path: Path) -> _File:
    parts = path.relative_to(folder).parts[:-1]
    shard = _SHARD.fullmatch(stem_of(path))
    splits = [word for part in (*parts, stem_of(path)) if (word := _split_in(part))]
    split = shard["split"] if shard else (splits[-1] if splits else "")
    config = tuple(part for part in parts if part != "data" and not _split_in(part))
    return _File(path, split, config, (int(shard["number"]), int(shard["total"])) if shard else None)


def _split_in(name: str) -> str:
    words = [_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS]
    return words[0] if words else ""


def _check_alike(folder: Path, files: Sequence[_File]) -> None:
    """Files that belong together are of one kind, in one place, and all there.

    Raises:
        InputError: They are not.
    """
    expected = "files of one kind in one folder; name the files, or a folder of fewer"
    for told in (
        {"/".join(file.config) or "." for file in files},
        {form_of(file.path) + (PACKED if is_packed(file.path) else "") for file in files},
    ):
        if len(told) > 1:
            raise InputError(str(folder), f"rows in {' and '.join(sorted(told)[:3])}", expected)
    shards: dict[int, set[int]] = {}
    for file in files:
        if file.shard:
            shards.setdefault(file.shard[1], set()).add(file.shard[0])
    for total, numbers in shards.items():
        if not len(numbers) == len(files) == total:
            found = f"{len(files)} files of {files[0].split}, of which {len(numbers)} are of {total} shards"
            raise InputError(str(folder), found, "all shards of one set")
