"""Every way to name preference data gives the same pairs, and what is unclear is refused."""

import gzip
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from ctpd_nemo.data import files, json_array, unpack
from ctpd_nemo.data.paths import relative_to
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.errors import InputError

ODD = 'a "quote", a \\ backslash, [brackets], {braces}, 日本 🙂, \u2028 and \x00'
ROWS: list[dict[str, Any]] = [
    {"id": f"n{number}", "prompt": f"{ODD} {number}", "chosen": [{"role": "assistant", "content": "x" * number + ODD}]}
    | {"rejected": "Paris.", "more": {"nested": [[1, number], [2]], "a": "]"}}
    for number in range(7)
]
Write = Callable[[Path], Path]


def lines(rows: list[dict[str, Any]] = ROWS, **options: Any) -> bytes:
    return b"".join(json.dumps(row, **options).encode() + b"\n" for row in rows)


def written(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def shards(*names: str) -> Write:
    """Files in a folder, with the rows in the order of the names given."""

    def write(folder: Path) -> Path:
        home, size = folder / "set", -(-len(ROWS) // len(names))
        for number, name in enumerate(names):
            own, path = ROWS[number * size : (number + 1) * size], home / name
            if path.suffix == ".parquet":
                table(path, own)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(lines(own))
        (home / "README.md").write_text("A dataset.")
        (home / "dataset_infos.json").write_text("{}")
        return home

    return write


SAME: dict[str, Write] = {
    "lines": written("pairs.jsonl", lines()),
    "lines by another name": written("pairs.ndjson", lines()),
    "a name in capitals": written("PAIRS.JSONL", lines()),
    "a list": written("pairs.json", json.dumps(ROWS).encode()),
    "a list over many lines": written("pairs.JSON", json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
    "a list behind a mark": written("pairs.json", b"\xef\xbb\xbf \r\n" + json.dumps(ROWS).encode() + b"\n\n"),
    "a list in an object": written("pairs.json", json.dumps({"version": "1", "n": [1, 2], "data": ROWS}).encode()),
    "lines by the name of a list": written("pairs.json", lines()),
    "packed lines": written("pairs.jsonl.gz", gzip.compress(lines())),
    "packed lines in capitals": written("Pairs.Ndjson.GZ", gzip.compress(lines())),
    "two packed parts": written("pairs.jsonl.gz", gzip.compress(lines(ROWS[:3])) + gzip.compress(lines(ROWS[3:]))),
    "a packed list": written("pairs.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "a folder of lines": shards("a.jsonl", "b.jsonl", "c.jsonl"),
    "shards as the Hub has them": shards(*(f"data/train-{n:05d}-of-00003.parquet" for n in range(3))),
    "shards with sums": shards(*(f"data/train-{n:05d}-of-00002-0123456789abcdef.parquet" for n in range(2))),
    "shards of a split with a name": shards(*(f"data/train_prefs-{n:05d}-of-00002.parquet" for n in range(2))),
    "shards in a folder of the split": shards("default/train/0000.parquet", "default/train/0001.parquet"),
    "shards at the top": shards(*(f"train-{n:05d}-of-00002.jsonl" for n in range(2))),
    "one file of a split": shards("my-train.jsonl"),
}


@pytest.mark.parametrize("name", SAME)
def test_every_file_and_folder_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    expected = open_preferences(written("expected.jsonl", lines())(tmp_path / "expected"))
    dataset = open_preferences(SAME[name](tmp_path / "given"))
    assert dataset.fingerprint == expected.fingerprint
    for row, one, other in zip(range(len(ROWS)), dataset, expected, strict=True):
        assert (one.id, one.prompt, one.chosen, one.rejected) == (other.id, other.prompt, other.chosen, other.rejected)
        assert one.place == dataset.place(row)
        assert dataset.fields(row)["id"] == f"n{row}"
    assert len({pair.place for pair in dataset}) == len(ROWS)
    again = pickle.loads(pickle.dumps(dataset))
    assert list(again) == list(dataset)


def test_a_split_of_a_folder_is_chosen_by_its_name(tmp_path: Path) -> None:
    home = tmp_path / "set"
    names = {
        "train": "data/train_prefs-00000-of-00001.parquet",
        "test": "data/test_prefs-00000-of-00001.parquet",
        "sft": "data/train_sft-00000-of-00001.parquet",
    }
    for number, name in enumerate(names.values()):
        table(home / name, ROWS[number : number + 1])
    assert [pair.id for pair in open_preferences(home, split="test_prefs")] == ["n1"]
    with pytest.raises(InputError, match="the splits test_prefs, train_prefs, train_sft and none asked for"):
        open_preferences(home)
    with pytest.raises(InputError, match="found no split 'dev'; expected one of test_prefs, train_prefs, train_sft"):
        open_preferences(home, split="dev")
    by_folder = tmp_path / "folders"
    for number, name in enumerate(("train/0.jsonl", "test/0.jsonl", "validation/0.jsonl")):
        written(name, lines(ROWS[number : number + 1]))(by_folder)
    assert [pair.id for pair in open_preferences(by_folder, split="validation")] == ["n2"]
    # A file beside it has no splits, and is read as it is.
    both = [by_folder, written("more.jsonl", lines(ROWS[5:]))(tmp_path)]
    assert [pair.id for pair in open_preferences(both, split="test")] == ["n1", "n5", "n6"]


def test_a_saved_dataset_is_still_one(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "chosen": "x"} for row in ROWS])
    DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "saved")
    assert [pair.id for pair in open_preferences(tmp_path / "saved", split="test")] == ["n2"]


def test_a_pattern_is_what_it_matches_in_order_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("b.jsonl", "a.jsonl", "a/c.jsonl", "x[1].jsonl")):
        written(name, lines(ROWS[number : number + 1]))(tmp_path)
    ids = lambda *paths: [pair.id for pair in open_preferences(list(paths))]  # noqa: E731
    assert ids(tmp_path / "?.jsonl") == ["n1", "n0"]
    assert ids(tmp_path / "**" / "[ac].jsonl") == ["n1", "n2"]
    assert ids(str(tmp_path / "b*"), str(tmp_path / "*.jsonl")) == ["n0", "n1", "n0", "n3"]
    # A name that is there is no pattern.
    assert ids(tmp_path / "x[1].jsonl") == ["n3"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids("~/a.jsonl", "~/[b].jsonl") == ["n1", "n0"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-such-user").mkdir()
    written("~no-such-user/a.jsonl", lines(ROWS[4:5]))(tmp_path)
    assert ids("~no-such-user/a.jsonl") == ["n4"]
    for path, found in (("none/*.jsonl", "no file or folder that matches"), ("", "an empty name")):
        with pytest.raises(InputError, match=found):
            open_preferences(path)


def test_a_path_is_found_from_another_folder(tmp_path: Path) -> None:
    """As a run that is done again finds its data."""
    home = tmp_path / "a[b]"
    written("data/x.jsonl", lines(ROWS[:1]))(home)
    for path in ("data/x.jsonl", "data/*.jsonl", str(home / "data/x.jsonl")):
        assert len(open_preferences(relative_to(home, path))) == 1
    assert relative_to(home, "~/x.jsonl") == "~/x.jsonl"


@pytest.mark.parametrize("block", [1, 2, 7, 64, 2**20])
def test_rows_of_a_list_are_found_wherever_blocks_of_the_file_end(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Python's own parser, on lists of odd values, cut at every length of a block."""
    monkeypatch.setattr(json_array, "_BLOCK", block)
    rng = random.Random(block)
    alphabet = ['"', "\\", "[", "]", "{", "}", ",", ":", " ", "\n", "é", "🙂", "a"]

    def value(depth: int) -> Any:
        kind = rng.randrange(6 if depth else 4)
        if kind == 0:
            return rng.choice([None, True, -1.5e3, 0])
        if kind < 4:
            return "".join(rng.choices(alphabet, k=rng.randrange(8)))
        if kind == 4:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return {"".join(rng.choices(alphabet, k=3)): value(depth - 1) for _ in range(2)}

    for _ in range(30):
        rows = [{"k": value(3), "l": value(2)} for _ in range(rng.randrange(1, 5))]
        shape = rng.randrange(3)
        whole = [rows, {"x": "[", "rows": rows, "y": 1}, {"a": {"rows": [[1]]}, "rows": rows}][shape]
        text = json.dumps(whole, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        path = tmp_path / "pairs.json"
        path.write_text(rng.choice(["", " \n"]) + text + rng.choice(["", "\n "]), encoding="utf-8")
        with path.open("rb") as file:
            bounds = json_array.row_bounds(file, "pairs.json")
        assert bounds is not None
        content = path.read_bytes()
        assert [json.loads(content[begin:end]) for begin, end in bounds] == rows


def test_one_object_is_a_row_and_lists_of_a_row_are_none(tmp_path: Path) -> None:
    row = {"id": "n", "prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}
    for indent in (None, 2):
        path = written("pair.json", json.dumps(row, indent=indent).encode())(tmp_path)
        assert [pair.id for pair in open_preferences(path)] == ["n"]


def test_a_bad_element_of_a_list_is_that_rows_fault(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    path = written("pairs.json", b"[" + b",".join([good, b"{bad}", b'"text"', good, b"\xff"]) + b"]")(tmp_path)
    dataset = open_preferences(path, on_bad="skip")
    assert [pair.place for pair in dataset] == [f"{path}:1", f"{path}:4"]
    assert dict(dataset.skipped) == {"malformed_json": 1, "not_an_object": 1, "invalid_utf8": 1}
    with pytest.raises(InputError, match=r"pairs\.json:2: found malformed JSON .*; expected one JSON object a row"):
        open_preferences(path)


def test_a_list_is_indexed_without_holding_it(tmp_path: Path) -> None:
    """Twenty megabytes of rows, in less than a quarter of that."""
    import tracemalloc

    row = json.dumps({"prompt": "x" * 100_000, "chosen": "a", "rejected": "b"}).encode()
    with (tmp_path / "pairs.json").open("wb") as file:
        file.write(b"[" + row)
        for _ in range(199):
            file.write(b",\n" + row)
        file.write(b"]")
    tracemalloc.start()
    try:
        (source,) = files.open_sources(tmp_path / "pairs.json")
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
    assert len(source) == 200
    assert len(source.read(199)["prompt"]) == 100_000


def test_what_is_unpacked_lies_on_no_path_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_ALWAYS_ALLOWED", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    bomb = written("bomb.jsonl.gz", gzip.compress(bytes(10**6)))(tmp_path)
    with pytest.raises(InputError, match=rf"bomb\.jsonl\.gz: found more than {200 * os.path.getsize(bomb):,} bytes"):
        open_preferences(bomb)
    dataset = open_preferences(written("pairs.jsonl.gz", gzip.compress(lines()))(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(dataset) == len(ROWS)
