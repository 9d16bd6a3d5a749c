"""Files and folders that hold no preference pairs."""

import gzip
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.case import Case, Scene, Values
from tests.hostile.rows import GOOD

FORMATS, JSON_LINE = "a .jsonl file", "one JSON object a line"
ROWS = [GOOD, {**GOOD, "chosen": "The Black Sea."}]
LINE = json.dumps(GOOD).encode() + b"\n"


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _made(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def _table(**columns: Any) -> pa.Table:
    whole = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], **columns}
    return pa.table({name: column for name, column in whole.items() if column is not None})


def _parquet(**columns: Any) -> Callable[[Path], Path]:
    return _made("pairs.parquet", lambda path: pq.write_table(_table(**columns), path))


def _parquet_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> None:
        pq.write_table(_table(), path)
        path.write_bytes(edit(path.read_bytes()))

    return _made("pairs.parquet", make)


def _twice(path: Path) -> None:
    names = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), path)


def _saved(edit: Callable[[Path], object], splits: bool = False) -> Callable[[Path], Path]:
    """A folder that ``save_to_disk`` wrote, with something done to it."""

    def make(path: Path) -> None:
        rows = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict({"train": rows, "test": rows}) if splits else rows).save_to_disk(path)
        edit(path)

    return _made("saved", make)


def _state(**changed: Any) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, **changed}))

    return edit


def _half(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[: (path / name).stat().st_size // 2])


def _outside(path: Path) -> None:
    """A whole dataset, whose rows lie beside it."""
    shutil.move(path / "data-00000-of-00001.arrow", path.parent / "rows.arrow")
    _state(_data_files=[{"filename": "../rows.arrow"}])(path)


def _featured(feature: dict[str, Any]) -> Callable[[Path], Path]:
    """Rows that name files, which a feature of this type would open."""

    def make(path: Path) -> None:
        named = {"bytes": None, "path": "/etc/passwd"}
        datasets.Dataset.from_list([{**GOOD, "chosen": {**named, "bytes": b""}}]).save_to_disk(path)
        info = json.loads((path / "dataset_info.json").read_text())
        info["features"]["chosen"] = feature
        (path / "dataset_info.json").write_text(json.dumps(info))

    return _made("saved", make)


def _random(size: int) -> bytes:
    return random.Random(0).randbytes(size)


def _flipped(data: bytes) -> bytes:
    return data[:-12] + bytes([data[-12] ^ 1]) + data[-11:]


def _folder_of(**files: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> None:
        for name, content in files.items():
            place = path / name.replace("__", "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    return _made("folder", make)


_PICKLED = pa.field(
    "chosen",
    pa.string(),
    metadata={
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(os.getcwd, protocol=0).decode("latin-1"),
    },
)
_BROKEN_TEXT = pa.array([b"\xe9"], pa.binary()).view(pa.string())
_ARROW, _SAVED = "data-00000-of-00001.arrow", "a folder that datasets' save_to_disk wrote"

# How it is written, the place behind the folder, what is found, what is expected.
FILES: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "no such file": (
        _made("absent.jsonl", lambda path: None),
        "absent.jsonl",
        "no such file or folder",
        "a preference",
    ),
    "an empty file": (_bytes("empty.jsonl", b""), "empty.jsonl", "no rows", "at least one"),
    "blank lines": (_bytes("blank.jsonl", b"\n \n\r\n\t\n"), "blank.jsonl", "no rows", "at least one"),
    "a mark and nothing else": (_bytes("mark.jsonl", b"\xef\xbb\xbf\n"), "mark.jsonl:1", "malformed JSON", JSON_LINE),
    "two marks": (_bytes("marks.jsonl", b"\xef\xbb\xbf" * 2 + LINE), "marks.jsonl:1", "malformed JSON", JSON_LINE),
    "a name without an extension": (_bytes("pairs", LINE), "pairs", "the extension ''", FORMATS),
    "comma-separated": (_bytes("pairs.csv", b"a,b\n"), "pairs.csv", "the extension '.csv'", FORMATS),
    "tab-separated": (_bytes("pairs.tsv", b"a\tb\n"), "pairs.tsv", "the extension '.tsv'", FORMATS),
    "an empty list": (_bytes("pairs.json", b" [ ]\n"), "pairs.json", "no rows", "at least one"),
    "a list that is cut": (_bytes("pairs.json", b"[" + LINE[:-1] + b","), "pairs.json", "does not end", "a whole file"),
    "a list that is cut in a string": (_bytes("pairs.json", b"[" + LINE[:20]), "pairs.json", "does not end", "a whole"),
    "a list and more": (_bytes("pairs.json", b"[" + LINE + b"] x"), "pairs.json", "text behind the list", "one list"),
    "a list of lists": (
        _bytes("pairs.json", b"[[" + LINE + b"]]"),
        "pairs.json:1",
        "JSON of type list",
        "one JSON obj",
    ),
    "a list with a comma too many": (
        _bytes("pairs.json", b"[" + LINE + b",]"),
        "pairs.json:2",
        "malformed JSON",
        "one JSON object a row",
    ),
    "an object that is no row": (
        _bytes("pairs.json", b'{"a": 1}'),
        "pairs.json:1, field 'chosen'",
        "no such",
        "a value",
    ),
    "an object of two lists": (
        _bytes("pairs.json", b'{"train": [{}], "test": [{}]}'),
        "pairs.json",
        "lists of objects under 'train' and 'test'",
        "an object with one list",
    ),
    "a pickle file": (_bytes("pairs.pkl", pickle.dumps(ROWS)), "pairs.pkl", "the extension '.pkl'", FORMATS),
    "a NumPy file": (_bytes("pairs.npy", b"\x93NUMPY"), "pairs.npy", "the extension '.npy'", FORMATS),
    "text by the name of gzip": (
        _bytes("pairs.jsonl.gz", LINE),
        "pairs.jsonl.gz",
        "a gzip file that cannot",
        "a whole",
    ),
    "gzip of Parquet": (
        _bytes("pairs.parquet.gz", gzip.compress(b"PAR1")),
        "pairs.parquet.gz",
        "the extension",
        FORMATS,
    ),
    "gzip that ends early": (
        _bytes("pairs.jsonl.gz", gzip.compress(_random(9999))[:-9]),
        "pairs.jsonl.gz",
        "a gzip file that cannot be read",
        "a whole one",
    ),
    "gzip with a flipped byte": (
        _bytes("pairs.jsonl.gz", _flipped(gzip.compress(LINE * 9))),
        "pairs.jsonl.gz",
        "a gzip file that cannot be read",
        "a whole one",
    ),
    "gzip of zeros without end": (
        _made("bomb.jsonl.gz", lambda path: path.write_bytes(gzip.compress(bytes(80 * 2**20)))),
        "bomb.jsonl.gz",
        "more than 67,108,864 bytes",
        "text that packs",
    ),
    "a pattern that matches nothing": (lambda folder: folder / "*.jsonl", "*.jsonl", "no file or folder that", "some"),
    "gzip by another name": (_bytes("pairs.jsonl", gzip.compress(LINE)), "pairs.jsonl:1", "the byte 0x8b", "UTF-8"),
    "gzip that is cut": (_bytes("pairs.jsonl", gzip.compress(LINE * 99)[:60]), "pairs.jsonl:1", "the byte 0x8b", ""),
    "zstd by another name": (_bytes("pairs.jsonl", b"\x28\xb5\x2f\xfd\x04"), "pairs.jsonl:1", "the byte 0xb5", "UTF-8"),
    "UTF-16": (_bytes("pairs.jsonl", LINE.decode().encode("utf-16")), "pairs.jsonl:1", "the byte 0xff", "UTF-8"),
    "UTF-32": (_bytes("pairs.jsonl", LINE.decode().encode("utf-32")), "pairs.jsonl:1", "the byte 0xff", "UTF-8"),
    "random bytes": (_bytes("pairs.jsonl", b"\xfe" + _random(5000)), "pairs.jsonl:1", "the byte 0xfe", "UTF-8"),
    "NUL bytes": (_bytes("pairs.jsonl", bytes(4096)), "pairs.jsonl:1", "malformed JSON", JSON_LINE),
    "a line without end": (
        _made("pairs.jsonl", lambda path: (path.touch(), os.truncate(path, 65 * 2**20))),
        "pairs.jsonl:1",
        "a line of 67,108,864 bytes or more",
        "JSON Lines",
    ),
    "one list over many lines": (
        _bytes("pairs.jsonl", json.dumps(ROWS, indent=2).encode()),
        "pairs.jsonl:1",
        "malformed JSON",
        JSON_LINE,
    ),
    "one list on one line": (
        _bytes("pairs.jsonl", json.dumps(ROWS).encode()),
        "pairs.jsonl:1",
        "JSON of type list",
        JSON_LINE,
    ),
    "a pipe": (_made("pipe.jsonl", os.mkfifo), "pipe.jsonl", "a pipe or a device", "more than once"),
    "a device": (
        _made("zero.jsonl", lambda path: path.symlink_to("/dev/zero")),
        "zero.jsonl",
        "a pipe or a device",
        "more than",
    ),
    "a link to nothing": (
        _made("link.jsonl", lambda path: path.symlink_to("gone.jsonl")),
        "link.jsonl",
        "no such file or folder",
        "",
    ),
    "a link to itself": (
        _made("link.jsonl", lambda path: path.symlink_to(path)),
        "link.jsonl",
        "no such file or folder",
        "",
    ),
    "a name with a NUL": (lambda folder: folder / "a\0b.jsonl", r"a\x00b.jsonl", "no such file or folder", "a pref"),
    "a name of a thousand letters": (lambda folder: folder / ("a" * 1000), "aaaa", "File name too long", "a path"),
    "a folder of something else": (_made("folder", Path.mkdir), "folder", "without state.json", "save_to_disk"),
    "a folder of two splits": (
        _folder_of(**{"train.jsonl": LINE, "test.jsonl": LINE}),
        "folder",
        "the splits test, train and none asked for",
        "data.split",
    ),
    "a shard that is missing": (
        _folder_of(**{"data__train-00000-of-00002.jsonl": LINE}),
        "folder",
        "1 are of 2 shards",
        "all shards of one set",
    ),
    "a folder of two forms": (
        _folder_of(**{"a.jsonl": LINE, "b.json": b"[]"}),
        "folder",
        "rows in .json and .jsonl",
        "files of one kind",
    ),
    "a folder of two languages": (
        _folder_of(**{"de__a.jsonl": LINE, "en__a.jsonl": LINE}),
        "folder",
        "rows in de and en",
        "files of one kind in one folder",
    ),
    "a file beside a split": (
        _folder_of(**{"train.jsonl": LINE, "more.jsonl": LINE}),
        "folder",
        "more.jsonl beside the split train",
        "data.split",
    ),
    # Parquet
    "no Parquet": (_bytes("pairs.parquet", b"no"), "pairs.parquet", "Arrow cannot read", "a Parquet file"),
    "an empty Parquet file": (_bytes("pairs.parquet", b""), "pairs.parquet", "Arrow cannot read", "a Parquet file"),
    "Parquet that is cut": (_parquet_bytes(lambda data: data[:-30]), "pairs.parquet", "Arrow cannot read", ""),
    "an encrypted footer": (_parquet_bytes(lambda data: data[:-4] + b"PARE"), "pairs.parquet", "Arrow cannot read", ""),
    "a footer of 2 GB": (
        _parquet_bytes(lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"),
        "pairs.parquet",
        "Arrow cannot read",
        "",
    ),
    "pages of zeros": (
        _parquet_bytes(lambda data: data[:4] + bytes(60) + data[64:]),
        "pairs.parquet",
        "Arrow cannot read",
        "",
    ),
    "a column twice": (_made("pairs.parquet", _twice), "pairs.parquet", "Arrow cannot read", "a Parquet file"),
    "no rows": (_parquet(**dict.fromkeys(GOOD, pa.array([], pa.string()))), "pairs.parquet", "no rows", "at least one"),
    "no column chosen": (_parquet(chosen=None), "pairs.parquet:1, field 'chosen'", "no such field", "a value"),
    "numbers for text": (_parquet(chosen=[1]), "pairs.parquet:1, field 'chosen'", "a number", "a string or a list"),
    "bytes for text": (_parquet(chosen=[b"b"]), "pairs.parquet:1, field 'chosen'", "a value of type bytes", "a string"),
    "nulls for text": (_parquet(rejected=pa.nulls(1)), "pairs.parquet:1, field 'rejected'", "null", "a value"),
    "dates for text": (
        _parquet(rejected=pa.array([0], pa.timestamp("s"))),
        "pairs.parquet:1, field 'rejected'",
        "datetime",
        "a string",
    ),
    "a date beyond all dates": (
        _parquet(rejected=pa.array([2**62], pa.timestamp("us"))),
        "pairs.parquet:1",
        "a value that cannot be",
        "text",
    ),
    "messages without content": (
        _parquet(chosen=[[{"role": "assistant"}]]),
        "pairs.parquet:1, field 'chosen[0]'",
        "'role': a string",
        "a mess",
    ),
    "text that is no UTF-8": (_parquet(chosen=_BROKEN_TEXT), "pairs.parquet:1", "can't decode byte 0xe9", "UTF-8"),
    "a type that is a pickle": (
        _made(
            "pairs.parquet",
            lambda path: pq.write_table(
                pa.table(
                    [["a"], ["a"], ["a"]],
                    schema=pa.schema([("prompt", pa.string()), _PICKLED, ("rejected", pa.string())]),
                ),
                path,
            ),
        ),
        "pairs.parquet",
        "",
        "",
    ),
    # Folders of datasets
    "rows that are cut": (_saved(_half(_ARROW)), "saved", "a folder that cannot be read", _SAVED),
    "rows that are gone": (_saved(lambda path: (path / _ARROW).unlink()), "saved", "a folder that cannot be", _SAVED),
    "no description": (_saved(lambda path: (path / "dataset_info.json").unlink()), "saved", "cannot be read", _SAVED),
    "a state that is no JSON": (
        _saved(lambda path: (path / "state.json").write_text("{")),
        "saved/state.json",
        "no JSON",
        "the state of",
    ),
    "a state that is a list": (
        _saved(lambda path: (path / "state.json").write_text("[]")),
        "saved/state.json",
        "a JSON list",
        "the state of",
    ),
    "rows in another folder": (_saved(_outside), "state.json, _data_files", "'../rows.arrow'", "in the same folder"),
    "rows at the root": (
        _saved(_state(_data_files=[{"filename": "/dev/zero"}])),
        "state.json, _data_files",
        "'/dev/zero'",
        "same folder",
    ),
    "rows without a name": (_saved(_state(_data_files=[{}])), "state.json, _data_files", "None", "in the same folder"),
    "no files of rows": (_saved(_state(_data_files=[])), "saved", "a folder that cannot be read", _SAVED),
    "images for text": (_featured({"_type": "Image"}), "saved, field 'chosen'", "a feature of type Image", "strings"),
    "sound for text": (_featured({"_type": "Audio"}), "saved, field 'chosen'", "a feature of type Audio", "strings"),
    "a feature nobody knows": (_featured({"_type": "Evil"}), "saved", "cannot be read", _SAVED),
    "several splits": (_saved(lambda path: None, splits=True), "saved", "the splits train, test", "the name of one"),
    "splits in another folder": (
        _saved(lambda path: (path / "dataset_dict.json").write_text('{"splits": ["../saved2"]}'), splits=True),
        "dataset_dict.json",
        "splits = ['../saved2']",
        "names of folders in this one",
    ),
    "a split that is gone": (
        _saved(lambda path: shutil.rmtree(path / "test"), splits=True),
        "saved/test/state.json",
        "no such file",
        "",
    ),
}


def file_cases() -> list[Case]:
    def build(write: Callable[[Path], Path]) -> Callable[[Scene], Values]:
        return lambda scene: {"data": {"train": [str(write(scene.folder))]}}

    cases = [Case(name, "files", build(write), *rest) for name, (write, *rest) in FILES.items()]
    split = {"data": {"split": "train"}}
    plain = [
        Case("no files", "files", lambda scene: {"data": {"train": []}}, "data.train", "no files", "one or more"),
        Case("a split of a file", "files", lambda scene: split, "data.split", "'train'", "no split"),
    ]
    return cases + plain
